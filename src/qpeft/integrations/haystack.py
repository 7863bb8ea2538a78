"""A reranker as a Haystack component."""

from __future__ import annotations

import dataclasses
from typing import Any

from qpeft.errors import MissingDependencyError, OptionError
from qpeft.integrations._opening import open_reranker
from qpeft.types import Reranker

try:
    from haystack import Document, component, default_from_dict, default_to_dict
except ImportError as error:
    raise MissingDependencyError("haystack-ai", "haystack") from error


@component
class QpeftRanker:
    """Orders documents for a query. The model is opened by `warm_up`, which the first `run` calls.

    Args:
        model: a ready reranker, or the first argument of `Reranker.from_pretrained`.
        top_k: how many documents stay; None: all.
        score_threshold: documents with a lower score are left out. Scores of query likelihood are log-probabilities in
            nats per query token, so below zero.
        options: the other arguments of `Reranker.from_pretrained`.
    """

    def __init__(
        self,
        model: str | Reranker,
        *,
        top_k: int | None = 10,
        score_threshold: float | None = None,
        **options: Any,
    ) -> None:
        self.model = model
        self.top_k = top_k
        self.score_threshold = score_threshold
        self.options = options
        self._reranker: Reranker | None = None

    def warm_up(self) -> None:
        """Open the model, once."""
        if self._reranker is None:
            self._reranker = open_reranker(self.model, self.options)

    @component.output_types(documents=list[Document])
    def run(
        self,
        query: str,
        documents: list[Document],
        top_k: int | None = None,
        score_threshold: float | None = None,
    ) -> dict[str, list[Document]]:
        """Return `documents`: copies with scores, best first. `top_k` and `score_threshold` override the component's.

        Raises:
            QueryError: the query is empty or does not fit the model.
        """
        self.warm_up()
        assert self._reranker is not None
        top_k = self.top_k if top_k is None else top_k
        least = self.score_threshold if score_threshold is None else score_threshold
        ranked = self._reranker.rank(query, [document.content or "" for document in documents], top_k=top_k)
        kept = [entry for entry in ranked if least is None or entry["score"] >= least]
        return {"documents": [dataclasses.replace(documents[e["corpus_id"]], score=e["score"]) for e in kept]}

    def to_dict(self) -> dict[str, Any]:
        """Return what a saved pipeline keeps of the component.

        Raises:
            OptionError: it was given a ready reranker, which cannot be saved.
        """
        if not isinstance(self.model, str):
            raise OptionError("a component with a ready reranker cannot be saved; give it the model's name and options")
        return default_to_dict(
            self, model=self.model, top_k=self.top_k, score_threshold=self.score_threshold, **self.options
        )

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> QpeftRanker:
        """Make the component from what `to_dict` returned."""
        made: QpeftRanker = default_from_dict(cls, data)
        return made
