"""Whether cost grows in proportion to candidates and to queries, and memory does not: 100 to 100,000 pairs.

    python benchmarks/scaling.py --output benchmarks/results/scaling.json      # and scaling.png beside it

Once the queries grow (100 candidates each), once the candidates (10 queries). Candidates come from a generator and go
through `Reranker.rerank` one query at a time, so whatever grows, grows in the reranker. Passages are short (about 10
tokens, all different), so that the largest point takes a minute or two. Each point is a process of its own; its memory
is the peak while reranking, the model included. `--quick` stops at 1,000 pairs.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tables
from memory import peak_mib, reset_peak
from qpeft import Reranker
from qpeft.types import Candidates, Passage, Query
from rounds import made, set_up

WORDS = (
    *("river", "stone", "winter", "music", "engine", "cell", "treaty", "harbour", "copper", "planet", "grammar"),
    *("bridge", "market", "forest", "signal", "court", "metal", "island", "garden", "letter", "doctor", "storm"),
)
PASSAGE_WORDS, QUERY_WORDS = 6, 3
SWEEPS = {
    "queries": [(1, 100), (10, 100), (100, 100), (1000, 100)],
    "candidates": [(10, 10), (10, 100), (10, 1000), (10, 10_000)],
}
"""(queries, candidates of each), by what grows."""


def generated(queries: int, depth: int) -> Iterator[Candidates]:
    """Yield queries with passages of random words; no passage occurs twice."""
    rng = random.Random(0)
    for q in range(queries):
        passages = tuple(
            Passage(f"{q}-{i}", " ".join([*rng.choices(WORDS, k=PASSAGE_WORDS), str(q), str(i)])) for i in range(depth)
        )
        yield Candidates(Query(str(q), " ".join(rng.choices(WORDS, k=QUERY_WORDS))), passages)


def measure(queries: int, depth: int) -> dict[str, Any]:
    """Return seconds and peak memory of reranking, in this process."""
    reranker = Reranker.from_pretrained("tiny-lm", device="cpu", dtype="bfloat16")
    for _ in reranker.rerank(generated(1, 50)):
        pass
    reset_peak()
    started = time.perf_counter()
    pairs = sum(len(ranking.hits) for ranking in reranker.rerank(generated(queries, depth)))
    seconds = time.perf_counter() - started
    return {
        "queries": queries,
        "candidates": depth,
        "pairs": pairs,
        "seconds": round(seconds, 3),
        "peak MiB": round(peak_mib(), 1),
    }


def exponent(points: Sequence[dict[str, Any]]) -> float:
    """Return the slope of log seconds over log pairs, by least squares, leaving out the smallest point."""
    xs = [math.log(point["pairs"]) for point in points[1:]]
    ys = [math.log(point["seconds"]) for point in points[1:]]
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / sum((a - x) ** 2 for a in xs)


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw seconds and peak memory over pairs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for name, marker in (("queries", "o"), ("candidates", "s")):
        points = [point for point in result["points"] if point["grows"] == name]
        pairs = [point["pairs"] for point in points]
        left.loglog(pairs, [point["seconds"] for point in points], marker=marker, label=f"more {name}")
        right.semilogx(pairs, [point["peak MiB"] for point in points], marker=marker, label=f"more {name}")
    left.set(xlabel="pairs", ylabel="seconds")
    right.set(xlabel="pairs", ylabel="peak memory, MiB", ylim=(0, None))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--quick", action="store_true", help="up to 1,000 pairs")
    parser.add_argument("--one", type=int, nargs=2, metavar=("QUERIES", "CANDIDATES"), help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args(arguments)
    set_up(args.threads)
    if args.one:
        print(json.dumps(measure(*args.one)))
        return
    threads = [] if args.threads is None else ["--threads", str(args.threads)]
    points, exponents = [], {}
    for name, sweep in SWEEPS.items():
        own = []
        for queries, depth in sweep:
            if args.quick and queries * depth > 1000:
                continue
            command = [sys.executable, __file__, *threads, "--one", str(queries), str(depth)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr)
            own.append({"grows": name, **json.loads(done.stdout.splitlines()[-1])})
            print(own[-1], file=sys.stderr)
        points += own
        exponents[name] = round(exponent(own), 4) if len(own) > 2 else None
    result = {"kind": "scaling", "points": points, "exponents": exponents, "made": made()}
    print(tables.render(result))
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        draw(result, args.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
