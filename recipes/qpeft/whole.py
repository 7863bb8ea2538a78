"""Groups that are one piece of work: the model alone, other queries, other first stages."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from statistics import fmean
from typing import Any

from bench import DEPTHS, MINI, TEST_QUERIES, Bench, measure_on, order, per_query, scorer_of, write
from cells import AUTHORS, Cell, lora, main, shipped, sizes, transfer_homes, variants
from confirmation import HOME, LORA, MORE, TESTED

from qpeft import adapters
from qpeft.adapters._folder import load_adapter
from qpeft.data.candidates import candidates_from_run
from qpeft.evaluation.measures import evaluate
from qpeft.methods.query_likelihood import QueryLikelihood
from qpeft.provenance import provenance
from qpeft.retrieval.dense import Dense
from qpeft.retrieval.fusion import reciprocal_rank_fusion
from qpeft.template import load_template
from qpeft.training.config import TrainingConfig
from qpeft.training.dev import DevRanking
from qpeft.types import Run

FRESH_QUERIES, FRESH_CHUNK = 1500, 100
SHIPPED = ("qpeft_a", "qpeft_r")
STAGE_QUERIES = {"reddit-shift": 300, "squad": 300, "wiki-shift": 200, MINI: 76}
CHOICE_QUERIES = 300
STAGE_DEPTH, FUSED_DEPTH = 20, 100
"""Candidates that are reranked, and hits of each first stage that are fused."""


def measured_alone(bench: Bench) -> dict[str, Any]:
    """Measure the first stage, and the model alone."""
    scorer = bench.scorer()
    found: dict[str, Any] = {"bm25": {}, "zero_shot": {}}
    for name, count in TEST_QUERIES.items():
        queries = bench.queries(name, "test", count)
        qrels = bench.collection(name).qrels("test")
        run = bench.first_stage(name, queries, DEPTHS[name])
        found["bm25"][name] = {"per_query": per_query(run, {q.id: qrels[q.id] for q in queries})}
        found["zero_shot"][name] = measure_on(bench, scorer, name)
    return found


def dev_alone(bench: Bench) -> dict[str, Any]:
    """Measure on dev what stands beside settings that were compared there: all that is not trained."""
    lm, measure = bench.lm(), TrainingConfig().measure
    items, qrels = bench.dev([HOME])
    first = evaluate(order(items), {item.query.id: qrels[item.query.id] for item in items}, measure)
    found: dict[str, Any] = {"bm25": first.means[measure]}
    for told, template in (("zero_shot", "plain"), ("zero_shot-authors", AUTHORS)):
        scorer = scorer_of(lm, load_template(template))
        found[told] = DevRanking(scorer, items, qrels, measure).measure(None)[measure]
    for name in ("qpeft_a", "qpeft_r"):
        adapter = adapters.build(name, adapters.load(name).Config(), lm)
        scorer = scorer_of(lm, load_template("plain"), adapter)
        found[f"untrained {name}"] = DevRanking(scorer, items, qrels, measure).measure(adapter)[measure]
    return found


def choice(bench: Bench) -> dict[str, Any]:
    """Measure on dev of five collections, each by itself, what may ship: adapter → collection → RR@10."""
    mixed = (cell for cell in transfer_homes() if cell.seed == 1 and "+" in cell.home)
    cells = {f"{cell.row}, {cell.queries} queries": cell for cell in (*mixed, *shipped(), *variants())}
    found: dict[str, Any] = {}
    for home in (*(name for name in TEST_QUERIES if name != "cacm"), MINI):  # which has no dev queries
        items = bench.candidates(home, "dev", CHOICE_QUERIES, STAGE_DEPTH)
        qrels = bench.collection(home).qrels("dev")
        judged = {item.query.id: qrels[item.query.id] for item in items}
        path = bench.output / "choice" / f"{home}.json"
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        for name in ("zero_shot", *cells):
            folder = bench.output / "adapters" / cells[name].name if name in cells else None
            if name not in known and (folder is None or folder.is_dir()):
                scorer = bench.scorer(load_adapter(folder, bench.lm()) if folder else None)
                run = DevRanking(scorer, items, qrels, "RR@10").rank(scorer.adapter)
                known[name] = per_query(run, judged)["RR@10"]
                write(path, known)
                print(time.strftime("%H:%M:%S"), home, name, round(fmean(known[name].values()), 4), flush=True)
            if name in known:
                found.setdefault(name, {})[home] = known[name]
    return found


def trained_at_home() -> list[Cell]:
    """Return the cells of the rows that the claim is about."""
    return [cell for cell in main() if cell.home == HOME and cell.row in (*TESTED, "soft_prompt")]


def first_trial(bench: Bench) -> dict[str, Any]:
    """Measure on the 200 queries of an early trial, whose values are known (README): BM25 top-50 of reddit-shift."""
    collection = bench.collection(HOME)
    known = collection.queries("test")
    queries = random.Random(1).sample(list(known.values()), 200)
    run = bench.first_stage(HOME, queries, 50)
    items = list(candidates_from_run(run, known, collection.passages, 50))
    qrels = collection.qrels("test")
    found = {
        "bm25": {"per_query": per_query(run, {q.id: qrels[q.id] for q in queries})},
        "zero_shot": measure_on(bench, bench.scorer(), HOME, items=items),
    }
    for cell in trained_at_home():
        if cell.seed == 1:
            opened = load_adapter(bench.output / "adapters" / cell.name, bench.lm())
            found[cell.row] = measure_on(bench, bench.scorer(opened), HOME, items=items)
    return found


def confirm(bench: Bench, number: int, of: int) -> None:
    """Rank further test queries with the main adapters: a test of what the table suggested.

    Chunk by chunk of queries, so that a chunk's passages are encoded once for all adapters.
    """
    known = TEST_QUERIES[HOME]
    collection = bench.collection(HOME)
    fresh = bench.queries(HOME, "test", known + FRESH_QUERIES)[known:]
    later = [cell for cell in lora() if cell.row == LORA and cell.home == HOME]
    later += [cell for cell in sizes() if cell.row in TESTED and cell.home == HOME and cell.queries == MORE]
    for start in range(0, FRESH_QUERIES, FRESH_CHUNK)[number::of]:
        target = bench.output / "confirm" / f"{start:04d}.json"
        found: dict[str, Any] = json.loads(target.read_text(encoding="utf-8")) if target.exists() else {}
        missing = [cell for cell in (*trained_at_home(), *later) if cell.name not in found]
        if found and not missing:
            continue
        run = bench.first_stage(HOME, fresh[start : start + FRESH_CHUNK], DEPTHS[HOME])
        items = list(candidates_from_run(run, collection.queries("test"), collection.passages, DEPTHS[HOME]))
        if not found:
            judged = {item.query.id: collection.qrels("test")[item.query.id] for item in items}
            found = {"bm25": {"per_query": per_query(run, judged)}, "made": provenance()}
            found["zero_shot"] = measure_on(bench, bench.scorer(), HOME, items=items)
        for cell in missing:
            opened = load_adapter(bench.output / "adapters" / cell.name, bench.lm())
            found[cell.name] = measure_on(bench, bench.scorer(opened), HOME, items=items)
            opened.adapter.withdraw()
        write(target, found)
        print(time.strftime("%H:%M:%S"), target.name, flush=True)


def first_stages(bench: Bench) -> dict[str, Any]:
    """Rerank what BM25, a dense retriever and their fusion find, with the adapters that ship."""
    opened = {row: load_adapter(f"tiny-lm-{row.replace('_', '-')}", bench.lm()) for row in SHIPPED}
    systems = {"zero_shot": bench.scorer(), **{row: bench.scorer(each) for row, each in opened.items()}}
    found: dict[str, Any] = {}
    for name, count in STAGE_QUERIES.items():
        target = bench.output / "first-stages" / f"{name}.json"
        if not target.exists():
            write(target, stages_of(bench, name, count, systems))
            print(time.strftime("%H:%M:%S"), name, flush=True)
        found[name] = json.loads(target.read_text(encoding="utf-8"))
    return found


def stages_of(bench: Bench, name: str, count: int, systems: dict[str, QueryLikelihood]) -> dict[str, Any]:
    """Return first stage → system → what was measured on one collection."""
    collection, queries = bench.collection(name), bench.queries(name, "test", count)
    qrels = {query.id: collection.qrels("test")[query.id] for query in queries}
    bm25 = Run(bench.index(name).retrieve(queries, FUSED_DEPTH), "bm25")
    dense = Run(Dense(collection.passages.values()).retrieve(queries, FUSED_DEPTH), "minilm")
    found: dict[str, Any] = {}
    for run in (bm25, dense, reciprocal_rank_fusion([bm25, dense], FUSED_DEPTH, tag="fusion")):
        items = list(candidates_from_run(run, collection.queries("test"), collection.passages, STAGE_DEPTH))
        found[run.tag] = {"first_stage": {"per_query": per_query(run, qrels)}}
        for row, scorer in systems.items():
            found[run.tag][row] = measure_on(bench, scorer, name, items=items)
    return found


WHOLE: dict[str, tuple[Callable[[Bench], dict[str, Any]], str]] = {
    "baselines": (measured_alone, "cells/baselines.json"),
    "dev_baselines": (dev_alone, "dev-baselines.json"),
    "choice": (choice, "choice.json"),
    "first_trial": (first_trial, "first-trial.json"),
    "first_stages": (first_stages, "first-stages.json"),
}
"""Groups that are one piece of work, and the file each writes."""
