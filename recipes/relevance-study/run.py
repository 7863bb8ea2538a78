"""Train cells and run studies, each by the command line that anyone would use; what is done is not done again.

    python recipes/relevance-study/run.py DATA [PARTS…] [--method query_likelihood] [--collection squad] [--output DIR]

DATA holds the BEIR folders of cells.COLLECTIONS. Adapters and studies stand in the output folder; what is worth
keeping, the course of each training and each study's numbers, is copied to results/.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from cells import COLLECTIONS, DETAIL, KEEP_EVERY, LOSSES, PARTS, STUDY, TEMPLATES, TRAINING, Asked, Cell

RESULTS = Path(__file__).parent / "results"


def qpeft(*arguments: str) -> None:
    """Run a command; its failure is ours."""
    print(time.strftime("%H:%M:%S"), "qpeft", *arguments, flush=True)
    subprocess.run([sys.executable, "-m", "qpeft", *arguments], check=True)


def flags(options: dict[str, Any]) -> list[str]:
    """Return options as the command line takes them."""
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]


def of_method(method: str) -> list[str]:
    """Return the options that a method needs."""
    chosen = [] if method == "query_likelihood" else ["--method", method]
    return [*chosen, "--template", TEMPLATES[method]] if method in TEMPLATES else chosen


def train(data: Path, output: Path, cell: Cell) -> Path:
    """Return the folder of a trained cell."""
    folder = output / "adapters" / cell.name
    if not folder.exists():
        kept = ["--keep-every", str(KEEP_EVERY)] if cell.kept else []
        qpeft(
            "train", "--adapter", "lora", *of_method(cell.method), "--collection", str(data / cell.collection),
            *flags(TRAINING), "--loss", LOSSES[cell.method], "--learning-rate", f"{cell.learning_rate:g}",
            "--modules", cell.modules, "--r", str(cell.rank), "--seed", str(cell.seed), *kept,
            "--output", str(folder), "--resume",
        )  # fmt: skip
    made = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
    told = {name: made[name] for name in ("training", "dev", "history", "versions", "machine")}
    write(RESULTS / "training" / f"{cell.name}.json", {"learning_rate": cell.learning_rate, **told})
    return folder


def first_stage(data: Path, output: Path, collection: str) -> Path:
    """Return BM25's run of a collection's test queries."""
    run = output / f"{collection}-bm25.trec"
    if not run.exists():
        qpeft("retrieve", "--collection", str(data / collection), "--split", "test", "--depth", "20", "--output",
              str(run))  # fmt: skip
    return run


def study(data: Path, output: Path, asked: Asked) -> None:
    """Run a study, unless its numbers stand in results/ and are of these very adapters."""
    first = asked.cells[0]
    name = f"{first.collection}-{first.method}-{asked.study}"
    folder, target = output / "studies" / name, RESULTS / f"{name}.json"
    suffix = ".steps" if asked.study == "checkpoints" else ""
    folders = [output / "adapters" / f"{cell.name}{suffix}" for cell in asked.cells]
    if not (folder / "study.json").exists():
        options = DETAIL if asked.study in ("layers", "projections") else STUDY
        qpeft(
            "analyze", asked.study, *(part for each in folders for part in ("--adapter", str(each))),
            "--collection", str(data / first.collection), "--run", str(first_stage(data, output, first.collection)),
            *flags(options), "--output", str(folder), "--resume",
        )  # fmt: skip
    RESULTS.mkdir(parents=True, exist_ok=True)
    found = json.loads((folder / "study.json").read_text(encoding="utf-8"))
    for subject, part in zip(found["subjects"], found["made"]["adapters"], strict=True):
        subject["folder"] = part["folder"] = Path(subject["folder"]).relative_to(output / "adapters").as_posix()
    for option in ("collection", "run", "adapter"):
        found["made"]["options"].pop(option)  # paths of one machine
    write(target, found)
    for picture in folder.glob("*.png"):
        shutil.copyfile(picture, RESULTS / f"{name}-{picture.name}")


def write(path: Path, value: Any) -> None:
    """Write JSON beside its place and move it there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value) + "\n", encoding="utf-8")
    temporary.replace(path)


def main() -> None:
    """Do the parts asked for, collection by collection."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with the BEIR folders")
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; by default all but rates")
    parser.add_argument("--method", choices=LOSSES, default="query_likelihood")
    parser.add_argument("--collection", choices=COLLECTIONS, action="append")
    parser.add_argument("--output", type=Path, default=Path("out/relevance-study"))
    args = parser.parse_args()
    parts = args.parts or [name for name in PARTS if name != "rates"]
    unknown = sorted(set(parts) - PARTS.keys())
    if unknown:
        parser.error(f"no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    for part in parts:
        for collection in args.collection or COLLECTIONS:
            for item in PARTS[part](collection, args.method):
                if isinstance(item, Cell):
                    train(args.data, args.output, item)
                else:
                    study(args.data, args.output, item)


if __name__ == "__main__":
    main()
