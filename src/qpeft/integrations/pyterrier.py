"""A reranker as a PyTerrier transformer. Nothing here starts Java."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qpeft.errors import InputError, MissingDependencyError
from qpeft.integrations._opening import open_reranker
from qpeft.types import Candidates, Passage, Query, Reranker

try:
    import pandas as pd
    import pyterrier as pt
except ImportError as error:
    raise MissingDependencyError("pyterrier", "pyterrier") from error


class QpeftReRanker(pt.Transformer):
    """Scores each query's documents anew: `bm25 >> pt.text.get_text(dataset, "text") >> QpeftReRanker(…)`.

    Takes frames with `qid`, `query`, `docno`, `text` and, if there is one, `title`; other columns and the order of the
    rows stay as they are. Batches reach across queries.

    Args:
        model: a ready reranker, or the first argument of `Reranker.from_pretrained`.
        options: the other arguments of `Reranker.from_pretrained`.
    """

    def __init__(self, model: str | Reranker, **options: Any) -> None:
        super().__init__()
        self.reranker = open_reranker(model, options)

    def transform(self, inp: pd.DataFrame) -> pd.DataFrame:
        """Return the frame with `score` (float64) and `rank` (from 0 within each query).

        Raises:
            InputError: a document's text is missing.
            QueryError: a query is empty or does not fit the model.
            pt.validate.InputValidationError: a column is missing.
        """
        pt.validate.result_frame(inp, extra_columns=["query", "text"], context=self)
        scores = [0.0] * len(inp)
        for ranking in self.reranker.rerank(_candidates(inp)):
            for hit in ranking.hits:
                scores[int(hit.passage_id)] = hit.score
        return pt.model.add_ranks(inp.assign(score=pd.Series(scores, index=inp.index, dtype="float64")))


def _candidates(frame: pd.DataFrame) -> Iterator[Candidates]:
    """Yield each query's documents; their ids are row numbers, since a docno may be a number or occur twice."""
    numbered = frame.assign(row=range(len(frame)), title=frame.get("title", ""))
    for qid, rows in numbered.groupby("qid", sort=False):
        passages = []
        asked = rows["query"].unique()
        if len(asked) > 1:
            raise InputError(f"query {str(qid)!r} has several texts: {asked[0]!r}, {asked[1]!r}")
        for docno, row, text, title in rows[["docno", "row", "text", "title"]].itertuples(index=False):
            if not isinstance(text, str):
                raise InputError(f"query {str(qid)!r}, document {str(docno)!r}: it has no text")
            passages.append(Passage(str(row), text, title if isinstance(title, str) else ""))
        yield Candidates(Query(str(qid), asked[0]), tuple(passages))
