"""The whole way on the embedded collection: candidates by BM25, reranking by the embedded model, measures, a report."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from qpeft.commands import compare, interpolate, rerank, retrieve
from qpeft.methods.query_likelihood import Config as QueryLikelihood
from qpeft.model_config import ModelConfig
from qpeft.retrieval.bm25 import Config as Bm25

MEASURES = "nDCG@10 RR@10 R@10"


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
        for name in ("bm25", "query_likelihood", "interpolated")
        for split in ("dev", "test")
    }
    for split in ("dev", "test"):
        _announce(f"{split}: BM25 finds {config.depth} candidates per query, tiny-lm scores them by query likelihood")
        candidates, reranked = files["bm25", split], files["query_likelihood", split]
        retrieve.run(retrieve.Config(config.collection, candidates, split, depth=config.depth), Bm25())
        Path(reranked + ".partial").unlink(missing_ok=True)
        rerank.run(
            rerank.Config(
                config.collection,
                candidates,
                reranked,
                split,
                depth=config.depth,
                limit_queries=config.limit_queries,
            ),
            ModelConfig(passage_cache=1.0),
            QueryLikelihood(),
        )
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
            run=(files["query_likelihood", "test"], files["interpolated", "test"]),
            measures=MEASURES,
            html=str(folder / "report.html"),
        )
    )


def _announce(text: str) -> None:
    print(f"\n== {text}", file=sys.stderr)
