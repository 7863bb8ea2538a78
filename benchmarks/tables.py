"""Results as Markdown: prints one, or puts all of them into docs/performance.md between their markers.

    python benchmarks/tables.py RESULT.json
    python benchmarks/tables.py --update      # docs/performance.md from benchmarks/results
    python benchmarks/tables.py --check       # exit status 1 where the two differ

A marker names a result's file; while there is none, "not measured yet" stands there:

    <!-- result: scoring-tiny-lm-cpu.json -->
    <!-- end -->

and `README.md`, with a line of each `brief: FILE FILE`.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "performance.md"
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
MISSING = "*not measured yet*"
ANSWERS = {True: "yes", False: "no", None: "absent"}
"""Whether what was wanted is met."""
MARKED = re.compile(r"(<!-- (?P<kind>result|brief): (?P<files>[\w. -]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a Markdown table whose columns but the first are aligned right."""
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def number(value: float) -> str:
    """Return three significant digits, with separators."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def spread(found: dict[str, float] | None) -> str:
    """Return the median of a ratio, with its lowest and highest."""
    return "absent" if found is None else f"{found['median']:.2f} ({found['low']:.2f}–{found['high']:.2f})"


def rate(case: dict[str, Any]) -> str:
    """Return pairs per second with the slowest and quickest round."""
    return f"{number(case['pairs/s'])} ({number(case['slowest'])}–{number(case['quickest'])})"


def count(case: dict[str, Any]) -> int:
    """Return how many pairs a case scores in a round."""
    return round(case["pairs/s"] * statistics.median(case["seconds"]))


def scoring(result: dict[str, Any]) -> str:
    """Return the tables of `scoring.py`."""
    against = result["against"]
    cases = [[name, count(case), rate(case), spread(against[name])] for name, case in result["cases"].items()]
    absent = [[name, "", why, ""] for name, why in result["absent"].items()]
    wanted = [
        [f"{each['case']} / {each['against']}", f"≥ {each['wanted']:g}", spread(each["measured"]),
         ANSWERS[each["met"]]]
        for each in result["targets"]
    ]  # fmt: skip
    agreement = result["agreement"].items()
    return "\n\n".join(
        [
            _pairs(result) + f" {result['gflop per pair']:g} GFLOP a pair. Largest differences from the float32 loop's "
            "scores: " + ", ".join(f"{name} {found['largest difference']:.1e}" for name, found in agreement) + " nats.",
            table(
                ["way", "pairs", "pairs/s (slowest–quickest round)", "qpeft does so many times as many"], cases + absent
            ),
            table(["wanted", "at least", "measured", "met"], wanted),
            _made(result),
        ]
    )


def brief(results: Iterable[dict[str, Any]]) -> str:
    """Return a line for each result of `scoring.py`: ours, and how many times as quick it is as others."""
    others = {
        "the plain loop": "plain loop, fp32",
        "CrossEncoder, fp32": "sentence-transformers CrossEncoder, fp32",
        "CrossEncoder, bf16": "sentence-transformers CrossEncoder, bf16",
    }
    lines = []
    for result in results:
        machine, rates = result["made"]["machine"], {name: case["pairs/s"] for name, case in result["cases"].items()}
        times = [f"{result['against'][name]['median']:.1f} ×" for name in others.values()]
        kept = number(rates["qpeft, passage cache filled"])
        lines.append([f"{machine['processor']}, {machine['cores']} cores", number(rates["qpeft"]), *times, kept])
    return table(["", "pairs/s", *others, "pairs/s, passages kept encoded"], lines)


def ablation(result: dict[str, Any]) -> str:
    """Return the table of `scoring.py --ablation`."""
    padded, times = result["padded share"], result["times full"]
    rows = [
        [name, rate(case), spread(times[name]) if name in times else "1",
         f"{padded[name]:.1%}" if name in padded else ""]
        for name, case in result["cases"].items()
    ]  # fmt: skip
    head = ["changed", "pairs/s (slowest–quickest round)", "times the full setting", "padding"]
    return "\n\n".join([_pairs(result), table(head, rows), _made(result)])


def scaling(result: dict[str, Any]) -> str:
    """Return the table of `scaling.py`."""
    rows = [
        [f"{point['queries']:,} × {point['candidates']:,}", f"{point['pairs']:,}", number(point["seconds"]),
         number(1e6 * point["seconds"] / point["pairs"]), number(point["peak MiB"])]
        for point in result["points"]
    ]  # fmt: skip
    slopes = ", ".join(
        f"{name} {'unknown' if slope is None else f'{slope:.3f}'}" for name, slope in result["exponents"].items()
    )
    head = ["queries × candidates", "pairs", "seconds", "µs a pair", "peak memory, MiB"]
    return "\n\n".join(
        [
            table(head, rows),
            f"Seconds grow as pairs to the power of: {slopes}.",
            "![Scaling](../benchmarks/results/scaling.png)",
            _made(result),
        ]
    )


def head_memory(result: dict[str, Any]) -> str:
    """Return the table of `head_memory.py`."""
    rows = [
        [point["way"], point["device"], f"{point['rows']:,}", f"{point['batch tokens']:,}", f"{point['scored']:,}",
         number(point["peak MiB"])]
        for point in result["points"]
    ]  # fmt: skip
    head = ["way", "device", "rows", "tokens in a batch", "scored tokens, all rows", "peak MiB above the model"]
    return "\n\n".join([f"Vocabulary {result['vocabulary']:,}.", table(head, rows), _made(result)])


def gpu(result: dict[str, Any]) -> str:
    """Return the tables of `gpu.py`."""
    parts = []
    for shape, found in result["shapes"].items():
        rows = [
            [each["what"], number(each["value"]) if "value" in each else each["absent"], each.get("unit", ""),
             number(each["peak GiB"]) if "peak GiB" in each else ""]
            for each in found["found"]
        ]  # fmt: skip
        parts += [f"**{shape}**", table(["what", "measured", "unit", "peak GiB"], rows), wanted(found["targets"])]
    return "\n\n".join([*parts, _made(result)])


def training(result: dict[str, Any]) -> str:
    """Return the tables of `training.py`."""
    allowed = result.get("products allow", {})
    rows = [
        [mode, rate(case), spread(result["against"][mode]), f"{allowed[mode]:.2f}" if mode in allowed else "",
         number(case["saved MiB"]), number(case["peak MiB"])]
        for mode, case in result["modes"].items()
    ]  # fmt: skip
    rows += [[mode, why, "", "", "", ""] for mode, why in result["absent"].items()]
    head = ["way", "rows/s (slowest–quickest round)", "times whole rows", "products allow",
            "kept for backpropagation, MiB", "peak, MiB"]  # fmt: skip
    settings = result["settings"]
    about = (
        f"{result['shape']}, {result['dtype']}, {settings['adapter']}: passages of {settings['passage_tokens']} "
        f"tokens, queries of {settings['query_tokens']}, {settings['batch']} rows in a step."
    )
    return "\n\n".join([about, table(head, rows), wanted(result["targets"]), _made(result)])


def storage(result: dict[str, Any]) -> str:
    """Return the table of `storage.py`."""
    names = list(result["rows"]["exact"])
    rows = [
        [kind, *(f"{row[name]:.4f}" if name in ("nDCG@10", "RR@10") else number(row[name]) for name in names)]
        for kind, row in result["rows"].items()
    ]
    about = f"{result['collection']}, {result['queries']} queries × BM25's first {result['depth']}."
    return "\n\n".join([about, table(["kept as", *names], rows), _made(result)])


def wanted(targets: Iterable[dict[str, Any]]) -> str:
    """Return a table of what was wanted, and whether it is met."""
    rows = [
        [each["case"], number(each["wanted"]), "absent" if each["measured"] is None else number(each["measured"]),
         ANSWERS[each["met"]]]
        for each in targets
    ]  # fmt: skip
    return table(["", "wanted", "measured", "met"], rows)


KINDS = {
    "scoring": scoring,
    "ablation": ablation,
    "scaling": scaling,
    "head_memory": head_memory,
    "gpu": gpu,
    "training": training,
    "storage": storage,
}


def render(result: dict[str, Any]) -> str:
    """Return a result as Markdown."""
    return KINDS[result["kind"]](result)


def _pairs(result: dict[str, Any]) -> str:
    facts = result["pairs"]
    return (
        f"{result['shape']}, {result['dtype']}, {result['collection']}: {facts['pairs']:,} pairs of "
        f"{facts['queries']:,} queries ({facts['words per query']:g} words) and {facts['passages']:,} passages "
        f"({facts['words per passage']:g} words), each passage in {facts['pairs per passage']:g} pairs."
    )


def _made(result: dict[str, Any]) -> str:
    made = result["made"]
    versions = ", ".join(
        f"{name} {made['versions'][name]}" for name in ("torch", "transformers") if name in made["versions"]
    )
    machine = made["machine"]
    where = machine.get("gpu") or f"{machine['processor']}, {machine['cores']} cores, {made['threads']} threads"
    load = made.get("load of the machine")
    busy = "" if load is None else f", load {load:.1f} at the end"
    return f"*{where}{busy}; {versions}; {made['created'][:10]}.*"


def page(text: str) -> str:
    """Return the page with every marked place filled from its result."""

    def fill(place: re.Match[str]) -> str:
        paths = [RESULTS / name for name in place["files"].split()]
        if not all(path.is_file() for path in paths):
            return f"{place[1]}{MISSING}\n{place[4]}"
        results = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
        found = brief(results) if place["kind"] == "brief" else render(results[0])
        return f"{place[1]}{found}\n{place[4]}"

    return MARKED.sub(fill, text)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="*", type=Path)
    parser.add_argument("--update", action="store_true")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args(arguments)
    for path in args.results:
        print(render(json.loads(path.read_text(encoding="utf-8"))))
    if args.update or args.check:
        for path in (PAGE, README):
            text = path.read_text(encoding="utf-8")
            filled = page(text)
            if args.update:
                path.write_text(filled, encoding="utf-8")
            elif filled != text:
                sys.exit(f"{path.name} is not what benchmarks/results say; run benchmarks/tables.py --update")


if __name__ == "__main__":
    main()
