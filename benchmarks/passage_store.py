"""The passage store beside reading the whole corpus into memory: time to open, passages a second, peak memory.

Each measurement is a process of its own, so that none inherits another's memory.
Usage: python benchmarks/passage_store.py [--passages 1000000] [--fetches 100000]
       [--output benchmarks/results/passage_store.json]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

WORDS = [f"word{i}" for i in range(5000)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--passages", type=int, default=1_000_000)
    parser.add_argument("--fetches", type=int, default=100_000)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--measure", nargs=2, metavar=("WHAT", "CORPUS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        what, corpus = args.measure
        print(json.dumps(MEASUREMENTS[what](Path(corpus), args.passages, args.fetches)))
        return
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus.jsonl"
        make_corpus(corpus, args.passages)
        result = {
            "passages": args.passages,
            "fetches": args.fetches,
            "corpus_bytes": corpus.stat().st_size,
            # In this order: the first builds the index, the second finds it.
            **{what: measure(what, corpus, args) for what in ("store_build", "store_reopen", "json_in_memory")},
            "hardware": hardware(),
        }
    text = json.dumps(result, indent=2)
    print(text)
    if args.output:
        args.output.write_text(text + "\n")


def make_corpus(path: Path, passages: int) -> None:
    rng = random.Random(0)
    with path.open("w") as file:
        for i in range(passages):
            text = " ".join(rng.choices(WORDS, k=75))
            file.write(json.dumps({"_id": f"doc{i}", "title": f"Title {i}", "text": text}) + "\n")


def measure(what: str, corpus: Path, args: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, __file__, "--passages", str(args.passages), "--fetches", str(args.fetches)]
    done = subprocess.run([*command, "--measure", what, str(corpus)], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def store(corpus: Path, passages: int, fetches: int) -> dict[str, float]:
    from qpeft.data.store import PassageStore

    start = time.perf_counter()
    opened = PassageStore(corpus)
    opened_s = time.perf_counter() - start
    return report(opened, passages, fetches, opened_s)


def json_in_memory(corpus: Path, passages: int, fetches: int) -> dict[str, float]:
    start = time.perf_counter()
    with corpus.open() as file:
        loaded = {record["_id"]: record for record in map(json.loads, file)}
    return report(loaded, passages, fetches, time.perf_counter() - start)


def report(mapping, passages: int, fetches: int, opened_s: float) -> dict[str, float]:
    rng = random.Random(1)
    ids = [f"doc{rng.randrange(passages)}" for _ in range(fetches)]
    start = time.perf_counter()
    for passage_id in ids:
        mapping[passage_id]
    fetched_s = time.perf_counter() - start
    return {
        "open_s": round(opened_s, 3),
        "fetches_per_s": round(fetches / fetched_s),
        "peak_resident_mib": round(peak_resident_mib(), 1),
    }


def peak_resident_mib() -> float:
    # Not getrusage: its maximum survives exec, and would include the parent's.
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def hardware() -> dict[str, object]:
    cpu = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    return {
        "cpu": cpu.split(":")[1].strip(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "numpy": version("numpy"),
        "platform": platform.platform(),
    }


MEASUREMENTS = {"store_build": store, "store_reopen": store, "json_in_memory": json_in_memory}

if __name__ == "__main__":
    main()
