"""Train cells and run studies, each by the command line that anyone would use; what is done is not done again.

    python recipes/relevance-study/run.py DATA [PARTS…] [--method query_likelihood] [--collection squad] [--output DIR]
    python recipes/relevance-study/run.py DATA --all

DATA holds the BEIR folders of cells.COLLECTIONS. First all trainings are done, then all studies, with --jobs several at
once. Adapters and studies stand in the output folder; what is worth keeping, the course of each training and each
study's numbers, is copied to results/, and the page written from it. Another --model than tiny-lm has folder and
results of its own, in the output folder, and its tables are printed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import table
from cells import (
    COLLECTIONS,
    KEEP_EVERY,
    LOSSES,
    PARTS,
    STEP_QUERIES,
    TEMPLATES,
    TRAINING,
    Asked,
    Cell,
    Scope,
    equal_ranks,
)

from qpeft.model_config import EMBEDDED


def flags(options: dict[str, Any]) -> list[str]:
    """Return options as the command line takes them."""
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]


def of_method(method: str) -> list[str]:
    """Return the options that a method needs."""
    chosen = [] if method == "query_likelihood" else ["--method", method]
    return [*chosen, "--template", TEMPLATES[method]] if method in TEMPLATES else chosen


@dataclass(frozen=True)
class Work:
    """Where things stand, and how they are done."""

    data: Path
    output: Path
    results: Path
    model: str
    jobs: int
    accumulation: int
    dtype: str | None
    rate: float | None

    def qpeft(self, name: str, cell: Cell, *arguments: str) -> None:
        """Run a command; its failure is ours. Of several at once, each writes a log of its own."""
        print(f"{time.strftime('%H:%M:%S')} qpeft {' '.join(arguments)}", flush=True)
        opened = ["--model", self.model, "--dtype", self.dtype or cell.dtype]
        command = [sys.executable, "-m", "qpeft", *arguments, *opened]
        if self.jobs == 1:
            subprocess.run(command, check=True)
            return
        threads = str(max(1, (os.cpu_count() or 1) // self.jobs))
        log = self.output / "logs" / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8") as told:
            done = subprocess.run(command, stdout=told, stderr=told, env={**os.environ, "OMP_NUM_THREADS": threads})
        if done.returncode:
            raise SystemExit(f"{log} says why `qpeft {arguments[0]}` failed")

    def all(self, work: Callable[[Any], Any], items: Iterable[Any]) -> None:
        """Do something for each item, several at once."""
        with ThreadPoolExecutor(self.jobs) as pool:
            for _ in pool.map(work, items):
                pass

    def train(self, cell: Cell) -> None:
        """Train a cell, unless that is done."""
        folder = self.output / "adapters" / cell.name
        rate = cell.rate or self.rate or cell.learning_rate
        if not folder.exists():
            kept = ["--keep-every", str(KEEP_EVERY)] if cell.kept else []
            queries = STEP_QUERIES // self.accumulation
            self.qpeft(
                cell.name, cell,
                "train", "--adapter", "lora", *of_method(cell.method), "--collection", str(self.data / cell.collection),
                *flags(TRAINING), "--batch-queries", str(queries), "--gradient-accumulation", str(self.accumulation),
                "--loss", cell.loss, "--learning-rate", f"{rate:g}",
                "--modules", cell.modules, "--r", str(cell.rank), "--seed", str(cell.seed), *kept,
                "--output", str(folder), "--resume",
            )  # fmt: skip
        made = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
        found = {"learning rate": made["options"]["learning_rate"], "number type": made["model"]["dtype"]}
        wanted = {"learning rate": rate, "number type": self.dtype or cell.dtype}
        if found != wanted:
            raise SystemExit(f"{folder} was trained with {found}, and {wanted} is asked for: give another --output")
        told = {name: made[name] for name in ("training", "dev", "history", "versions", "machine")}
        options = {name: made["options"][name] for name in ("learning_rate", "loss")}
        write(self.results / "training" / f"{cell.name}.json", {**options, "dtype": made["model"]["dtype"], **told})

    def first_stage(self, collection: str) -> Path:
        """Return BM25's run of a collection's test queries."""
        run = self.output / f"{collection}-bm25.trec"
        if not run.exists():
            subprocess.run(
                [sys.executable, "-m", "qpeft", "retrieve", "--collection", str(self.data / collection),
                 "--split", "test", "--depth", "20", "--output", str(run)],
                check=True,
            )  # fmt: skip
        return run

    def study(self, asked: Asked) -> None:
        """Run a study, unless that is done, and keep its numbers and pictures."""
        first = asked.cells[0]
        folder = self.output / "studies" / asked.name
        suffix = ".steps" if asked.part == "checkpoints" else ""
        folders = [self.output / "adapters" / f"{cell.name}{suffix}" for cell in asked.cells]
        if not (folder / "study.json").exists():
            self.qpeft(
                asked.name, first,
                "analyze", *asked.study, *(part for each in folders for part in ("--adapter", str(each))),
                "--collection", str(self.data / first.collection), "--run", str(self.first_stage(first.collection)),
                *flags(dict(asked.options)), "--output", str(folder), "--resume",
            )  # fmt: skip
        found = json.loads((folder / "study.json").read_text(encoding="utf-8"))
        for subject, part in zip(found["subjects"], found["made"]["adapters"], strict=True):
            subject["folder"] = part["folder"] = Path(subject["folder"]).relative_to(folders[0].parent).as_posix()
        for option in ("collection", "run", "adapter"):
            found["made"]["options"].pop(option)  # paths of one machine
        write(self.results / f"{asked.name}.json", found)
        table.renew(self.results / f"{asked.name}.json")


def write(path: Path, value: Any) -> None:
    """Write JSON beside its place and move it there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value) + "\n", encoding="utf-8")
    temporary.replace(path)


def main() -> None:
    """Do the parts asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with the BEIR folders")
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; by default all but rates and grid")
    parser.add_argument("--all", action="store_true", help="every part of every method on every collection")
    parser.add_argument("--method", choices=LOSSES, action="append", help="default: query_likelihood")
    parser.add_argument("--collection", choices=COLLECTIONS, action="append", help="default: all")
    parser.add_argument("--model", default=EMBEDDED, help="as `qpeft train` takes it")
    parser.add_argument("--learning-rate", type=float, help="by default what dev chose for tiny-lm (cells.py)")
    parser.add_argument("--jobs", type=int, default=1, help="trainings or studies at once")
    parser.add_argument(
        "--accumulation", type=int, default=4, choices=(1, 2, 4, 8), help="forward passes of a step; less memory"
    )
    parser.add_argument("--dtype", help="of the model, as `qpeft train` takes it; by default what cells.py says")
    parser.add_argument("--output", type=Path, default=Path("out/relevance-study"))
    args = parser.parse_args()
    if args.all and (args.parts or args.method or args.collection):
        parser.error("--all is every part, method and collection")
    parts = list(PARTS) if args.all else args.parts or [name for name in PARTS if name not in ("rates", "grid")]
    methods = list(LOSSES) if args.all else args.method or ["query_likelihood"]
    unknown = sorted(set(parts) - PARTS.keys())
    if unknown:
        parser.error(f"no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    output, results = args.output, table.RESULTS
    if args.model != EMBEDDED:
        output = output / args.model.replace("/", "--").strip(".-")
        results = output / "results"
    work = Work(args.data, output, results, args.model, args.jobs, args.accumulation, args.dtype, args.learning_rate)
    collections = args.collection or COLLECTIONS
    equal = equal_ranks(args.model) if "components" in parts else {}
    items = [
        item
        for part in parts
        for method in methods
        for collection in collections
        for item in PARTS[part](Scope(collection, method, equal))
    ]
    cells = list(dict.fromkeys(item for item in items if isinstance(item, Cell)))
    studies = [item for item in items if isinstance(item, Asked)]
    print(f"{len(cells)} trainings, {len(studies)} studies; what is done is not done again", flush=True)
    work.all(work.train, cells)
    for collection in dict.fromkeys(asked.cells[0].collection for asked in studies):
        work.first_stage(collection)
    work.all(work.study, studies)
    if args.model == EMBEDDED:
        table.write()
    else:
        print(table.tables(results))


if __name__ == "__main__":
    main()
