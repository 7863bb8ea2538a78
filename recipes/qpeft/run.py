"""Run cells of the Q-PEFT experiment; every finished cell is a JSON file, so the same command continues.

    python recipes/qpeft/run.py DATA GROUP [--worker 0/2] [--output DIR]

Groups are the functions of `cells.py`. With --worker i/n this process does every n-th cell.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cells import GROUPS, Cell
from scipy.stats import kendalltau

from qpeft import adapters
from qpeft.adapters._folder import AdapterFolder, load_adapter, save_adapter
from qpeft.data.candidates import candidates_from_run
from qpeft.data.collection import Collection, open_collection
from qpeft.evaluation.interpolation import interpolate
from qpeft.evaluation.measures import evaluate
from qpeft.loading import load_lm
from qpeft.model_config import ModelConfig
from qpeft.provenance import provenance
from qpeft.retrieval.bm25 import BM25
from qpeft.retrieval.dense import Dense
from qpeft.retrieval.fusion import reciprocal_rank_fusion
from qpeft.template import Prompt, Template, load_template
from qpeft.training.config import TrainingConfig
from qpeft.training.dev import DevRanking
from qpeft.training.groups import groups_from_collection
from qpeft.training.trainer import Collator, fit
from qpeft.types import Candidates, Group, Hit, Query, Ranking, Run

HERE = Path(__file__).parent
MEASURES = "nDCG@10 RR@10 R@5 R@10 CandHit@10 CandHit_clean@10 CandR@10 CandR_clean@10"
NEGATIVE_DEPTH = 30
DEPTHS = {"reddit-shift": 30, "squad": 30, "wiki-shift": 20, "nq-mini": 20, "cacm": 30}
"""Candidates of a test query."""
TEST_QUERIES = {"reddit-shift": 600, "squad": 300, "wiki-shift": 200, "nq-mini": 200, "cacm": 52}
DEV_QUERIES, DEV_DEPTH = 150, 15
STORE_GIB = 5.0


class Bench:
    """Collections, first stages and the model, opened when first needed and kept."""

    def __init__(self, data: Path, output: Path) -> None:
        self.data, self.output = data, output
        self.lm: Any = load_lm(ModelConfig("tiny-lm", passage_cache=STORE_GIB))
        self._collections: dict[str, Collection] = {}
        self._indexes: dict[str, BM25] = {}

    def prompt(self, opened: AdapterFolder | None = None) -> Prompt:
        """Return the prompt of an adapter, or of the model alone."""
        if opened is None:
            return Prompt(load_template("plain"), self.lm.tokenizer, self.lm.max_length)
        length = opened.adapter.hint_length
        return Prompt(opened.template, self.lm.tokenizer, self.lm.max_length, hint_length=length)

    def collection(self, name: str) -> Collection:
        """Return a collection."""
        if name not in self._collections:
            self._collections[name] = open_collection(str(self.data / name))
        return self._collections[name]

    def index(self, name: str) -> BM25:
        """Return its BM25 index."""
        if name not in self._indexes:
            self._indexes[name] = BM25(self.collection(name).passages.values())
        return self._indexes[name]

    def queries(self, name: str, split: str, count: int) -> list[Query]:
        """Return a fixed sample of a split's queries."""
        found = self.collection(name).queries(split)
        ids = sorted(found)
        random.Random(7).shuffle(ids)
        return [found[query_id] for query_id in ids[:count]]

    def first_stage(self, name: str, queries: list[Query], depth: int) -> Run:
        """Return BM25's ranking."""
        return Run(self.index(name).retrieve(queries, depth), "bm25")

    def candidates(self, name: str, split: str, count: int, depth: int) -> list[Candidates]:
        """Return candidates of a sample of queries."""
        collection = self.collection(name)
        queries = self.queries(name, split, count)
        run = self.first_stage(name, queries, depth)
        return list(candidates_from_run(run, collection.queries(split), collection.passages, depth))

    def groups(self, cell: Cell, negatives: int) -> list[Group]:
        """Return training groups, in equal shares from each home."""
        homes = cell.home.split("+")
        found = []
        for home in homes:
            share = cell.queries // len(homes)
            found += groups_from_collection(
                self.collection(home), "train", negatives=negatives, seed=cell.seed, queries=share, depth=NEGATIVE_DEPTH
            )[0]
        return found


def others(queries: list[Query]) -> dict[str, Query]:
    """Return for each query another one of the list: the next."""
    return {query.id: other for query, other in zip(queries, queries[1:] + queries[:1], strict=True)}


def per_query(run: Run, qrels: Any) -> dict[str, dict[str, float]]:
    """Return measure → query id → value."""
    evaluation = evaluate(run, qrels, MEASURES)
    return {name: {q: round(v, 6) for q, v in values.items()} for name, values in evaluation.per_query.items()}


def template_of(cell: Cell) -> Template:
    """Open a cell's template; files are named relative to this folder."""
    return load_template(str(HERE / cell.template) if cell.template.endswith(".yaml") else cell.template)


def run_alone(bench: Bench, cell: Cell) -> dict[str, Any]:
    """Measure the model alone under a cell's template."""
    prompt = Prompt(template_of(cell), bench.lm.tokenizer, bench.lm.max_length)
    facts = {"cell": dataclasses.asdict(cell), "trained_parameters": 0, "training_seconds": 0.0, "dev": {}}
    return {**facts, "test": {cell.home: measure_on(bench, prompt, cell.home, None)}}


def run_cell(bench: Bench, cell: Cell) -> dict[str, Any]:
    """Train and measure."""
    if not cell.adapter:
        return run_alone(bench, cell)
    lm = bench.lm
    module = adapters.load(cell.adapter)
    torch.manual_seed(cell.seed)
    adapter = module.build(module.Config(**cell.options), lm)
    template = template_of(cell)
    prompt = Prompt(template, lm.tokenizer, lm.max_length, hint_length=adapter.hint_length)
    training = TrainingConfig(**cell.training)
    groups = bench.groups(cell, training.negatives)
    homes = cell.home.split("+")
    dev_items, dev_qrels = [], {}
    for home in homes:
        dev_items += bench.candidates(home, "dev", DEV_QUERIES // len(homes), DEV_DEPTH)
        dev_qrels |= bench.collection(home).qrels("dev")
    read = others([g.query for g in groups]) if cell.shuffled else None
    dev_read = others([item.query for item in dev_items]) if cell.shuffled else None
    dev = DevRanking(lm, prompt, dev_items, dev_qrels, training.measure, dev_read)
    checkpoints = bench.output / "checkpoints" / cell.name
    fitted = fit(
        lm, adapter, groups, Collator(prompt, training, cell.seed, None, read), training,
        checkpoints=checkpoints, seed=cell.seed, dev=dev, resume=True, baselines=False, progress=False,
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
    if cell.test:
        folder = bench.output / "adapters" / cell.name
        facts = provenance(**{name: result[name] for name in ("cell", "dev", "history")}, training=summary(result))
        save_adapter(folder, cell.adapter, adapter, lm, template, provenance=facts)
        result["test"] = {homes[0]: measure_on(bench, prompt, homes[0], adapter, cell.shuffled)}
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


def measure_on(
    bench: Bench,
    prompt: Prompt,
    name: str,
    adapter: Any,
    shuffled: bool = False,
    items: list[Candidates] | None = None,
) -> dict[str, Any]:
    """Rank candidates of a collection's test queries; by default those of the sample."""
    items = items or bench.candidates(name, "test", TEST_QUERIES[name], DEPTHS[name])
    qrels = bench.collection(name).qrels("test")
    read = others([item.query for item in items]) if shuffled else None
    ranking = DevRanking(bench.lm, prompt, items, qrels, "RR@10", read)
    started = time.perf_counter()
    run = ranking.rank(adapter)
    seconds = time.perf_counter() - started
    pairs = sum(len(item.passages) for item in items)
    judged = {item.query.id: qrels[item.query.id] for item in items}
    first = Run(
        (
            Ranking(item.query.id, tuple(Hit(p.id, s) for p, s in zip(item.passages, item.scores, strict=True)))
            for item in items
        ),
        "bm25",
    )
    return {
        "per_query": per_query(run, judged),
        "mixed": per_query(interpolate(first, run, 0.5), judged),
        "agreement": agreement(first, run),
        "passages/s": round(pairs / seconds, 1),
    }


def agreement(first: Run, run: Run) -> float:
    """Return Kendall's tau between two rankings of the same passages, averaged over queries."""
    taus = []
    for query_id, ranking in run.items():
        place = {hit.passage_id: rank for rank, hit in enumerate(first[query_id].hits)}
        if len(place) > 1:
            taus.append(kendalltau(range(len(place)), [place[hit.passage_id] for hit in ranking.hits]).statistic)
    return round(float(np.mean(taus)), 4)


def transfer(bench: Bench, names: list[str]) -> None:
    """Measure the finished Q-PEFT adapters of the first seed on the collections that they were not trained on."""
    paths = sorted((bench.output / "cells").glob("*-qpeft_[ar]-*seed1-*.json"))
    for name in names:  # collection by collection, so that each passage is encoded once
        for path in paths:
            result = json.loads(path.read_text(encoding="utf-8"))
            folder = bench.output / "adapters" / path.stem
            if name in result["test"] or not folder.exists():
                continue
            opened = load_adapter(folder, bench.lm)
            measured = measure_on(bench, bench.prompt(opened), name, opened.adapter)
            result = json.loads(path.read_text(encoding="utf-8"))  # another worker may have added to it meanwhile
            result["test"][name] = measured
            write(path, result)
            print(time.strftime("%H:%M:%S"), name, path.stem, flush=True)


def first_trial(bench: Bench) -> dict[str, Any]:
    """Measure on the 200 queries of an early trial, whose values are known (README): BM25 top-50 of reddit-shift."""
    name = "reddit-shift"
    collection = bench.collection(name)
    known = collection.queries("test")
    queries = random.Random(1).sample(list(known.values()), 200)
    run = bench.first_stage(name, queries, 50)
    items = list(candidates_from_run(run, known, collection.passages, 50))
    qrels = collection.qrels("test")
    prompt = bench.prompt()
    found = {
        "bm25": {"per_query": per_query(run, {q.id: qrels[q.id] for q in queries})},
        "zero_shot": measure_on(bench, prompt, name, None, items=items),
    }
    for path in sorted((bench.output / "cells").glob("reddit-shift-320-*-seed1-*.json")):
        row = json.loads(path.read_text(encoding="utf-8"))["cell"]["row"]
        if row in ("qpeft_a", "qpeft_r", "soft_prompt"):
            opened = load_adapter(bench.output / "adapters" / path.stem, bench.lm)
            found[row] = measure_on(bench, bench.prompt(opened), name, opened.adapter, items=items)
    return found


FRESH_QUERIES, FRESH_CHUNK = 1500, 100
SHIPPED = ("qpeft_a", "qpeft_r")
STAGE_QUERIES = {"reddit-shift": 300, "squad": 300, "wiki-shift": 200}
STAGE_DEPTH, FUSED_DEPTH = 20, 100
"""Candidates that are reranked, and hits of each first stage that are fused."""


def confirm(bench: Bench, number: int, of: int) -> None:
    """Rank test queries that no other group reads, with the main adapters: a test of what the table suggested.

    Chunk by chunk of queries, so that a chunk's passages are encoded once for all adapters.
    """
    name, known = "reddit-shift", TEST_QUERIES["reddit-shift"]
    collection = bench.collection(name)
    fresh = bench.queries(name, "test", known + FRESH_QUERIES)[known:]
    paths = [
        path
        for path in sorted((bench.output / "cells").glob("reddit-shift-320-*.json"))
        if json.loads(path.read_text(encoding="utf-8"))["cell"] in confirmed()
    ]
    plain = bench.prompt()
    for start in range(0, FRESH_QUERIES, FRESH_CHUNK)[number::of]:
        target = bench.output / "confirm" / f"{start:04d}.json"
        if target.exists():
            continue
        run = bench.first_stage(name, fresh[start : start + FRESH_CHUNK], DEPTHS[name])
        items = list(candidates_from_run(run, collection.queries("test"), collection.passages, DEPTHS[name]))
        judged = {item.query.id: collection.qrels("test")[item.query.id] for item in items}
        found = {"bm25": {"per_query": per_query(run, judged)}}
        found["zero_shot"] = measure_on(bench, plain, name, None, items=items)
        for path in paths:
            opened = load_adapter(bench.output / "adapters" / path.stem, bench.lm)
            found[path.stem] = measure_on(bench, bench.prompt(opened), name, opened.adapter, items=items)
        write(target, {**found, "made": provenance()})
        print(time.strftime("%H:%M:%S"), target.name, flush=True)


def confirmed() -> list[dict[str, Any]]:
    """Return the cells whose adapters `confirm` measures."""
    rows = ("qpeft_a", "qpeft_r", "soft_prompt")
    return [json.loads(json.dumps(dataclasses.asdict(cell))) for cell in GROUPS["main"]() if cell.row in rows]


def first_stages(bench: Bench) -> dict[str, Any]:
    """Rerank what BM25, a dense retriever and their fusion find, with the adapters that ship."""
    opened = {row: load_adapter(f"tiny-lm-{row.replace('_', '-')}", bench.lm) for row in SHIPPED}
    systems: dict[str, tuple[Prompt, Any]] = {"zero_shot": (bench.prompt(), None)}
    systems |= {row: (bench.prompt(each), each.adapter) for row, each in opened.items()}
    found: dict[str, Any] = {}
    for name, count in STAGE_QUERIES.items():
        target = bench.output / "first-stages" / f"{name}.json"
        if not target.exists():
            write(target, stages_of(bench, name, count, systems))
            print(time.strftime("%H:%M:%S"), name, flush=True)
        found[name] = json.loads(target.read_text(encoding="utf-8"))
    return found


def stages_of(bench: Bench, name: str, count: int, systems: dict[str, tuple[Prompt, Any]]) -> dict[str, Any]:
    """Return first stage → system → what was measured on one collection."""
    collection, queries = bench.collection(name), bench.queries(name, "test", count)
    qrels = {query.id: collection.qrels("test")[query.id] for query in queries}
    bm25 = Run(bench.index(name).retrieve(queries, FUSED_DEPTH), "bm25")
    dense = Run(Dense(collection.passages.values()).retrieve(queries, FUSED_DEPTH), "minilm")
    found: dict[str, Any] = {}
    for run in (bm25, dense, reciprocal_rank_fusion([bm25, dense], FUSED_DEPTH, tag="fusion")):
        items = list(candidates_from_run(run, collection.queries("test"), collection.passages, STAGE_DEPTH))
        found[run.tag] = {"first_stage": {"per_query": per_query(run, qrels)}}
        for row, (prompt, adapter) in systems.items():
            found[run.tag][row] = measure_on(bench, prompt, name, adapter, items=items)
    return found


def measured_alone(bench: Bench) -> dict[str, Any]:
    """Measure the first stage, and the model alone."""
    prompt = bench.prompt()
    found: dict[str, Any] = {"bm25": {}, "zero_shot": {}}
    for name, count in TEST_QUERIES.items():
        queries = bench.queries(name, "test", count)
        qrels = bench.collection(name).qrels("test")
        run = bench.first_stage(name, queries, DEPTHS[name])
        found["bm25"][name] = {"per_query": per_query(run, {q.id: qrels[q.id] for q in queries})}
        found["zero_shot"][name] = measure_on(bench, prompt, name, None)
    return found


def write(path: Path, value: Any) -> None:
    """Write JSON beside its place and move it there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=None), encoding="utf-8")
    os.replace(temporary, path)


WHOLE: dict[str, tuple[Callable[[Bench], dict[str, Any]], str]] = {
    "baselines": (measured_alone, "cells/baselines.json"),
    "first_trial": (first_trial, "first-trial.json"),
    "first_stages": (first_stages, "first-stages.json"),
}
"""Groups that are one piece of work, and the file each writes."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with the BEIR folders")
    parser.add_argument("group", choices=[*GROUPS, *WHOLE, "transfer", "confirm"])
    parser.add_argument("--worker", default="0/1")
    parser.add_argument("--output", type=Path, default=Path("out/qpeft"))
    args = parser.parse_args()
    number, of = map(int, args.worker.split("/"))
    bench = Bench(args.data, args.output)
    if args.group in WHOLE:
        work, name = WHOLE[args.group]
        write(args.output / name, {**work(bench), "made": provenance()})
        return
    if args.group == "transfer":
        transfer(bench, list(TEST_QUERIES)[number::of])
        return
    if args.group == "confirm":
        confirm(bench, number, of)
        return
    for cell in list(GROUPS[args.group]())[number::of]:
        path = args.output / "cells" / f"{cell.name}.json"
        if not path.exists():
            result = run_cell(bench, cell)
            write(path, {**result, "made": provenance()})
            print(time.strftime("%H:%M:%S"), cell.name, result["dev"], result["training_seconds"], flush=True)


if __name__ == "__main__":
    main()
