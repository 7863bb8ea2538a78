"""The whole way on the embedded collection: BM25, zero-shot and Q-PEFT reranking, measures, a report, explanations."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from qpeft.commands import compare, interpolate, rerank, retrieve
from qpeft.methods.query_likelihood import Config as QueryLikelihood
from qpeft.model_config import ModelConfig
from qpeft.retrieval.bm25 import Config as Bm25

MEASURES = "nDCG@10 RR@10 R@10"
ADAPTERS = ("tiny-lm-qpeft-r", "tiny-lm-qpeft-a")
EXPLAINED = 3  # queries on the page of explanations


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
    folder.mkdir(parents=True, exist_ok=True)
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
    _announce("test: measures, and significance against BM25")
    compare.run(
        compare.Config(
            config.collection,
            baseline=files["bm25", "test"],
            run=tuple(files[name, "test"] for name in ("query_likelihood", "interpolated", *ADAPTERS)),
            measures=MEASURES,
            html=str(folder / "report.html"),
        )
    )
    _explain(config, folder / "explanations.html", files["bm25", "test"])


def _rerank(config: Config, split: str, candidates: str, output: str, adapter: str | None = None) -> None:
    Path(output + ".partial").unlink(missing_ok=True)
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


def _announce(text: str) -> None:
    print(f"\n== {text}", file=sys.stderr)
