"""The whole way on the embedded collection: BM25, zero-shot and Q-PEFT reranking, measures, a report, explanations."""

from __future__ import annotations

import gc
import itertools
import sys
from dataclasses import dataclass
from pathlib import Path

from qpeft import memory, methods
from qpeft.atomic import make_folder
from qpeft.commands import interpolate, rerank, retrieve
from qpeft.commands._judgements import judgements, read_costs, read_runs
from qpeft.data.candidates import candidates_from_run
from qpeft.data.collection import identity, open_collection
from qpeft.data.files import write_text
from qpeft.data.trec import read_run
from qpeft.evaluation.measures import evaluate
from qpeft.evaluation.significance import compare_all_pairs
from qpeft.evaluation.table_formats import text_table
from qpeft.evaluation.tables import Table, comparison_table, correction, measure_table
from qpeft.methods.query_likelihood import Config as QueryLikelihood
from qpeft.model_config import ModelConfig
from qpeft.provenance import provenance
from qpeft.retrieval.bm25 import Config as Bm25
from qpeft.types import Run

MEASURES = "nDCG@10 RR@10 R@10"
ADAPTERS = ("tiny-lm-qpeft-r", "tiny-lm-qpeft-a")
COLUMNS = ("run", "against", "measure", "difference", "interval", "p (Holm)")
"""Of the table of differences; with them it has room in 100 columns."""
EXPLAINED, SHOWN = 3, 8  # queries on the page of explanations, and passages of each


@dataclass(frozen=True)
class Config:
    """Demonstration."""

    output: str = "out/demo"
    """Folder for the runs and the report."""
    collection: str = "mini"
    """A collection with the splits dev and test."""
    depth: int = 30
    """Candidates per query."""
    limit_queries: int | None = None
    """Rerank only this many queries of each split."""


def run(config: Config) -> None:
    """Retrieve, rerank, interpolate, compare; say what is being done and where the results are."""
    folder = Path(config.output)
    make_folder(folder)
    files = {
        (name, split): str(folder / f"{name}.{split}.trec")
        for name in ("bm25", "query_likelihood", "interpolated", *ADAPTERS)
        for split in ("dev", "test")
    }
    for split in ("dev", "test"):
        _announce(f"{split}: BM25 finds {config.depth} candidates per query, tiny-lm scores them by query likelihood")
        retrieve.run(retrieve.Config(config.collection, files["bm25", split], split, depth=config.depth), Bm25())
        _rerank(config, split, files["bm25", split], files["query_likelihood", split])
    for name in ADAPTERS:
        _announce(f"test: Q-PEFT; the adapter {name} writes a hint into the frozen model's input")
        _rerank(config, "test", files["bm25", "test"], files[name, "test"], name)
    _announce("the weight of BM25 beside query likelihood is chosen on dev")
    interpolate.run(
        interpolate.Config(
            first=files["bm25", "test"],
            run=files["query_likelihood", "test"],
            output=files["interpolated", "test"],
            collection=config.collection,
            dev_first=files["bm25", "dev"],
            dev_run=files["query_likelihood", "dev"],
            depth=config.depth,
            tag="query_likelihood+bm25",
        )
    )
    _announce("test: measures, and significance against BM25 and against zero-shot query likelihood")
    runs = [files[name, "test"] for name in ("bm25", "query_likelihood", "interpolated", *ADAPTERS)]
    _compare(config.collection, runs, folder / "report.html", limited=config.limit_queries is not None)
    _explain(config, folder / "explanations.html", files["bm25", "test"])


def _rerank(config: Config, split: str, candidates: str, output: str, adapter: str | None = None) -> None:
    Path(output + ".partial").unlink(missing_ok=True)
    gc.collect()  # models and caches of earlier runs hold themselves
    memory.give_back()
    rerank.run(
        rerank.Config(
            config.collection,
            candidates,
            output,
            split,
            depth=config.depth,
            limit_queries=config.limit_queries,
            tag=adapter,
        ),
        ModelConfig(passage_cache=1.0),
        QueryLikelihood(adapter=adapter),
    )


def _compare(name: str, paths: list[str], report: Path, *, limited: bool) -> None:
    """Print measures and the differences that matter, and write a report with all of them.

    The first path is BM25's run, the second zero-shot's. p-values are corrected over all pairs, shown or not.
    """
    from qpeft.analysis.report import write_comparison_report

    runs = read_runs(paths)
    collection, judged = judgements(name, "test", "qrels", runs)
    # BM25 ranks all queries, the others perhaps the first few.
    qrels = {query_id: grades for query_id, grades in judged.items() if query_id in runs[1]} if limited else judged
    if limited:
        runs = [Run((run[query_id] for query_id in run if query_id in runs[1]), run.tag) for run in runs]
    evaluations = [evaluate(each, qrels, MEASURES) for each in runs]
    comparisons = compare_all_pairs(evaluations)
    first, zero_shot, _, *trained = (each.run for each in evaluations)
    shown = [
        each for each in comparisons if each.baseline == first or (each.baseline == zero_shot and each.run in trained)
    ]
    table = comparison_table(shown, digits=3)
    kept = [table.header.index(column) for column in COLUMNS]
    rows = tuple(tuple(row[place] for place in kept) for row in table.rows)
    note = f"p: paired t-test, two-sided; {correction(comparisons)}, the report has them all"
    print(text_table(measure_table(evaluations, comparisons, digits=3)))
    print(text_table(Table(COLUMNS, rows, (note,), names=3)))
    write_comparison_report(
        report,
        evaluations,
        comparisons,
        runs,
        qrels,
        collection.queries("test"),
        collection.passages,
        provenance(collection=identity(collection, "test")),
        costs=read_costs(runs, paths),
        title=f"{collection.name} · test",
    )
    print(f"report: {report}", file=sys.stderr)


def _explain(config: Config, page: Path, candidates: str) -> None:
    """Write a page that shows, for a few queries, what the hint changed in each query token."""
    from qpeft.analysis.explain import explain
    from qpeft.analysis.explanation_page import explanation_page
    from qpeft.loading import load_lm

    scorer = methods.open_scorer(load_lm(ModelConfig()), ADAPTERS[-1])
    collection = open_collection(config.collection)
    items = candidates_from_run(read_run(candidates), collection.queries("test"), collection.passages, SHOWN)
    shown = [
        (item.query.text, explain(scorer, item.query, item.passages)) for item in itertools.islice(items, EXPLAINED)
    ]
    with write_text(page) as file:
        file.write(explanation_page(shown, f"What the hint of {ADAPTERS[-1]} changed"))
    _announce(f"{page}: query tokens coloured by what the hint changed, for {EXPLAINED} queries")


def _announce(text: str) -> None:
    print(f"\n== {text}", file=sys.stderr)
