"""Run cells of the Q-PEFT experiment; every finished cell is a JSON file, so the same command continues.

    python recipes/qpeft/run.py DATA GROUP [--seed 1] [--only TEXT] [--worker 0/2] [--output DIR] [--model NAME=FOLDER]

Groups are the functions of `cells.py`. With --worker i/n this process does every n-th cell; with --only those alone
whose names hold a text. Cells of a language model whose folder is not given are passed over.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from bench import DEV_DEPTH, TEST_QUERIES, Bench, measure_on, reading, scorer_of, write
from cells import GROUPS, TRANSFERRED, Cell
from whole import WHOLE, confirm

from qpeft import adapters
from qpeft.adapters._folder import load_adapter, save_adapter
from qpeft.provenance import provenance
from qpeft.template import Template, load_template
from qpeft.training.config import TrainingConfig
from qpeft.training.dev import DevRanking
from qpeft.training.trainer import Collator, fit

HERE = Path(__file__).parent


def template_of(cell: Cell) -> Template:
    """Open a cell's template; files are named relative to this folder."""
    return load_template(str(HERE / cell.template) if cell.template.endswith(".yaml") else cell.template)


def run_alone(bench: Bench, cell: Cell) -> dict[str, Any]:
    """Measure the model alone under a cell's template."""
    scorer = scorer_of(bench.lm(cell.model), template_of(cell))
    facts = {"cell": dataclasses.asdict(cell), "trained_parameters": 0, "training_seconds": 0.0, "dev": {}}
    return {**facts, "test": {cell.home: measure_on(bench, scorer, cell.home)}}


def run_cell(bench: Bench, cell: Cell) -> dict[str, Any]:
    """Train and measure."""
    if not cell.adapter:
        return run_alone(bench, cell)
    lm = bench.lm(cell.model)
    module = adapters.load(cell.adapter)
    torch.manual_seed(cell.seed)
    adapter = adapters.build(cell.adapter, module.Config(**cell.options), lm)
    template = template_of(cell)
    scorer = scorer_of(lm, template, adapter)
    training = TrainingConfig(**cell.training)
    groups = bench.groups(cell, training.negatives)
    homes = cell.home.split("+")
    dev_items, dev_qrels = bench.dev(homes)
    train_scorer = reading(scorer, [group.query for group in groups], cell.shuffled)
    dev_scorer = reading(scorer, [item.query for item in dev_items], cell.shuffled)
    dev = DevRanking(dev_scorer, dev_items, dev_qrels, training.measure)
    fitted = fit(
        train_scorer, adapter, groups, Collator(train_scorer, training, cell.seed), training,
        checkpoints=checkpoints_of(bench, cell), seed=cell.seed, dev=dev, resume=True, baselines=False, progress=False,
    )  # fmt: skip
    result: dict[str, Any] = {
        "cell": dataclasses.asdict(cell),
        "trained_parameters": adapter.count_parameters(),
        "training_seconds": round(fitted.seconds, 1),
        "steps": fitted.steps,
        "dev": fitted.dev,
        "history": fitted.history,
        "test": {},
    }
    told = {"measure": dev.name, "queries": len(dev_items), "depth": DEV_DEPTH, "trained": fitted.dev["trained"]}
    facts = provenance(cell=result["cell"], history=fitted.history, training=summary(result), dev=told)
    save_adapter(bench.output / "adapters" / cell.name, cell.adapter, adapter, lm, template, provenance=facts)
    if cell.test:
        result["test"] = {homes[0]: measure_on(bench, scorer, homes[0], cell.shuffled)}
    adapter.withdraw()
    return result


def summary(result: dict[str, Any]) -> dict[str, Any]:
    """Return what a model card says of a training."""
    cell = result["cell"]
    return {
        "collections (train splits)": cell["home"].replace("+", ", "),
        "queries": cell["queries"],
        "seed": cell["seed"],
        "steps": result["steps"],
        "seconds": result["training_seconds"],
        **cell["training"],
    }


def chosen(groups: Iterable[str], args: argparse.Namespace) -> list[Cell]:
    """Return the cells of groups that were asked for, each once."""
    number, of = map(int, args.worker.split("/"))
    named = {cell.name: cell for group in groups for cell in GROUPS[group]() if args.seed in (None, cell.seed)}
    return [cell for name, cell in named.items() if args.only in name][number::of]


def transfer(bench: Bench, trained: list[Cell]) -> None:
    """Measure finished adapters on the collections that they were not trained on.

    Workers share the adapters, not the collections: two would write to one cell's file.
    """
    cells = []
    for cell in trained:
        if cell_file(bench, cell).exists():
            folder = bench.output / "adapters" / cell.name
            if folder.exists():
                cells.append((cell, folder))
            else:
                say(f"{cell.name}: no transfer is measured, its adapter is not in {folder.parent}")
    for name in TEST_QUERIES:  # collection by collection, so that each passage is encoded once
        for cell, folder in cells:
            path = cell_file(bench, cell)
            result = json.loads(path.read_text(encoding="utf-8"))
            if name in result["test"]:
                continue
            opened = load_adapter(folder, bench.lm())
            measured = measure_on(bench, bench.scorer(opened), name, cell.shuffled)
            opened.adapter.withdraw()
            write(path, {**result, "test": {**result["test"], name: measured}})
            print(time.strftime("%H:%M:%S"), name, path.stem, flush=True)


def cell_file(bench: Bench, cell: Cell) -> Path:
    """Return where a cell's result stands, once it is finished."""
    return bench.output / "cells" / f"{cell.name}.json"


def checkpoints_of(bench: Bench, cell: Cell) -> Path:
    """Return where a training that is not finished keeps its state."""
    return bench.output / "checkpoints" / cell.name


def say(text: str) -> None:
    """Say what was left out."""
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with the BEIR folders")
    parser.add_argument("group", choices=[*GROUPS, *WHOLE, "transfer", "confirm"])
    parser.add_argument("--seed", type=int, help="only cells of this seed")
    parser.add_argument("--only", default="", metavar="TEXT", help="only cells whose names hold this text")
    parser.add_argument("--worker", default="0/1")
    parser.add_argument("--output", type=Path, default=Path("out/qpeft"))
    parser.add_argument("--model", action="append", default=[], metavar="NAME=FOLDER", help="a model of cells.MODELS")
    args = parser.parse_args()
    bench = Bench(args.data, args.output, dict(given.split("=", 1) for given in args.model))
    if args.group in WHOLE:
        work, name = WHOLE[args.group]
        if not (args.output / name).exists():
            write(args.output / name, {**work(bench), "made": provenance()})
        return
    if args.group == "transfer":
        transfer(bench, chosen(TRANSFERRED, args))
        return
    if args.group == "confirm":
        confirm(bench, *map(int, args.worker.split("/")))
        return
    for cell in chosen([args.group], args):
        path = cell_file(bench, cell)
        if path.exists():
            continue
        if not bench.has(cell.model):
            say(f"{cell.name}: not run, --model {cell.model}=FOLDER is not given or no folder")
            continue
        result = run_cell(bench, cell)
        write(path, {**result, "made": provenance(model=bench.lm(cell.model).describe())})
        shutil.rmtree(checkpoints_of(bench, cell), ignore_errors=True)
        print(time.strftime("%H:%M:%S"), cell.name, result["dev"], result["training_seconds"], flush=True)


if __name__ == "__main__":
    main()
