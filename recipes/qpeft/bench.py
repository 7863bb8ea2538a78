"""What cells are run with: collections, first stages and language models, and how a ranking is measured."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from cells import Cell
from scipy.stats import kendalltau

from qpeft.adapters._folder import AdapterFolder
from qpeft.data.candidates import candidates_from_run
from qpeft.data.collection import Collection, open_collection
from qpeft.evaluation.interpolation import interpolate
from qpeft.evaluation.measures import evaluate
from qpeft.loading import load_lm
from qpeft.methods.query_likelihood import Config, QueryLikelihood
from qpeft.model_config import EMBEDDED, ModelConfig
from qpeft.retrieval.bm25 import BM25
from qpeft.template import Prompt, Template, load_template
from qpeft.training.dev import DevRanking
from qpeft.training.groups import groups_from_collection, next_queries
from qpeft.types import Candidates, Group, Hit, Query, Ranking, Run

MEASURES = "nDCG@10 RR@10 R@5 R@10 CandHit@10 CandHit_clean@10 CandR@10 CandR_clean@10"
NEGATIVE_DEPTH = 30
DEPTHS = {"reddit-shift": 30, "squad": 30, "wiki-shift": 20, "nq-mini": 20, "cacm": 30}
"""Candidates of a test query."""
TEST_QUERIES = {"reddit-shift": 600, "squad": 300, "wiki-shift": 200, "nq-mini": 200, "cacm": 52}
DEV_QUERIES, DEV_DEPTH = 150, 15
STORE_GIB = 5.0
MINI = "mini"
"""The embedded collection."""


class Bench:
    """Collections, first stages and language models, opened when first needed.

    Args:
        data: folder with the BEIR folders.
        output: where results go.
        models: folders of language models that do not ship, by the names that cells have for them.
    """

    def __init__(self, data: Path, output: Path, models: Mapping[str, str]) -> None:
        self.data, self.output = data, output
        self._models = {EMBEDDED: EMBEDDED} | {name: folder for name, folder in models.items() if Path(folder).is_dir()}
        self._lm: tuple[str, Any] = ("", None)
        self._collections: dict[str, Collection] = {}
        self._indexes: dict[str, BM25] = {}

    def has(self, model: str) -> bool:
        """Return whether a language model can be opened."""
        return model in self._models

    def lm(self, model: str = EMBEDDED) -> Any:
        """Return a language model; one is open at a time, since what it keeps of passages takes much memory."""
        if self._lm[0] != model:
            self._lm = ("", None)
            self._lm = (model, load_lm(ModelConfig(self._models[model], passage_cache=STORE_GIB)))
        return self._lm[1]

    def scorer(self, opened: AdapterFolder | None = None) -> QueryLikelihood:
        """Return the scorer of an adapter of the embedded model, or of the model alone."""
        if opened is None:
            return scorer_of(self.lm(), load_template("plain"))
        return scorer_of(self.lm(), opened.template, opened.adapter)

    def collection(self, name: str) -> Collection:
        """Return a collection."""
        if name not in self._collections:
            self._collections[name] = open_collection(name if name == MINI else str(self.data / name))
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

    def dev(self, homes: list[str]) -> tuple[list[Candidates], dict[str, Any]]:
        """Return candidates of dev queries, in equal shares from each home, and their judgements."""
        items: list[Candidates] = []
        qrels: dict[str, Any] = {}
        for home in homes:
            items += self.candidates(home, "dev", DEV_QUERIES // len(homes), DEV_DEPTH)
            qrels |= self.collection(home).qrels("dev")
        return items, qrels

    def groups(self, cell: Cell, negatives: int) -> list[Group]:
        """Return training groups, in equal shares from each home."""
        homes = cell.home.split("+")
        found = []
        for home in homes:
            run = self.any_passages(home, cell.seed) if cell.negatives == "random" else None
            share = cell.queries // len(homes)
            found += groups_from_collection(
                self.collection(home), "train", negatives=negatives, seed=cell.seed, queries=share,
                depth=NEGATIVE_DEPTH, run=run,
            )[0]  # fmt: skip
        return found

    def any_passages(self, home: str, seed: int) -> Run:
        """Return for each training query passages that have nothing to do with it: easy negatives."""
        ids = sorted(self.collection(home).passages)

        def drawn(query_id: str) -> Ranking:
            some = random.Random(f"random {seed} {query_id}").sample(ids, NEGATIVE_DEPTH)
            return Ranking(query_id, tuple(Hit(passage, -float(place)) for place, passage in enumerate(some)))

        return Run(map(drawn, self.collection(home).queries("train")), "random")


def scorer_of(lm: Any, template: Template, adapter: Any = None) -> QueryLikelihood:
    """Return the scorer of a language model, with an adapter or alone."""
    hint_length = None if adapter is None else adapter.hint_length
    prompt = Prompt(template, lm.tokenizer, lm.max_length, hint_length=hint_length)
    return QueryLikelihood(Config(), lm, prompt, adapter)


def per_query(run: Run, qrels: Any) -> dict[str, dict[str, float]]:
    """Return measure → query id → value."""
    evaluation = evaluate(run, qrels, MEASURES)
    return {name: {q: round(v, 6) for q, v in values.items()} for name, values in evaluation.per_query.items()}


def measure_on(
    bench: Bench,
    scorer: QueryLikelihood,
    name: str,
    shuffled: bool = False,
    items: list[Candidates] | None = None,
) -> dict[str, Any]:
    """Rank candidates of a collection's test queries; by default those of the sample."""
    items = items or bench.candidates(name, "test", TEST_QUERIES[name], DEPTHS[name])
    qrels = bench.collection(name).qrels("test")
    ranking = DevRanking(reading(scorer, [item.query for item in items], shuffled), items, qrels, "RR@10")
    started = time.perf_counter()
    run = ranking.rank(scorer.adapter)
    seconds = time.perf_counter() - started
    pairs = sum(len(item.passages) for item in items)
    judged = {item.query.id: qrels[item.query.id] for item in items}
    first = order(items)
    return {
        "per_query": per_query(run, judged),
        "mixed": per_query(interpolate(first, run, 0.5), judged),
        "agreement": agreement(first, run),
        "passages/s": round(pairs / seconds, 1),
    }


def reading(scorer: QueryLikelihood, queries: list[Query], shuffled: bool) -> QueryLikelihood:
    """Return the scorer whose adapter reads the next query in place of each, if that is asked for."""
    return scorer.with_hint_queries(next_queries(queries)) if shuffled else scorer


def order(items: list[Candidates]) -> Run:
    """Return candidates in the order in which they came."""
    rankings = (
        Ranking(item.query.id, tuple(Hit(p.id, s) for p, s in zip(item.passages, item.scores, strict=True)))
        for item in items
    )
    return Run(rankings, "bm25")


def agreement(first: Run, run: Run) -> float:
    """Return Kendall's tau between two rankings of the same passages, averaged over queries."""
    taus = []
    for query_id, ranking in run.items():
        place = {hit.passage_id: rank for rank, hit in enumerate(first[query_id].hits)}
        if len(place) > 1:
            taus.append(kendalltau(range(len(place)), [place[hit.passage_id] for hit in ranking.hits]).statistic)
    return round(float(np.mean(taus)), 4)


def write(path: Path, value: Any) -> None:
    """Write JSON beside its place and move it there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=None), encoding="utf-8")
    os.replace(temporary, path)
