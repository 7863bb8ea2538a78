"""A reranker as a LlamaIndex node postprocessor; needs `llama-index-core` only."""

from __future__ import annotations

from typing import Any

from qpeft.errors import InputError, MissingDependencyError
from qpeft.integrations._opening import open_reranker
from qpeft.types import Reranker

try:
    from llama_index.core.bridge.pydantic import PrivateAttr
    from llama_index.core.postprocessor.types import BaseNodePostprocessor
    from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle
except ImportError as error:
    raise MissingDependencyError("llama-index-core", "llama-index") from error


class QpeftRerank(BaseNodePostprocessor):
    """Orders retrieved nodes and gives them the reranker's scores.

    Args:
        model: a ready reranker, or the first argument of `Reranker.from_pretrained`.
        top_n: how many nodes stay; None: all.
        metadata_mode: which metadata is part of the text that is read; EMBED, as LlamaIndex's own rerankers have it,
            leaves out what a node excludes from embeddings.
        options: the other arguments of `Reranker.from_pretrained`.
    """

    top_n: int | None = None
    metadata_mode: MetadataMode = MetadataMode.EMBED
    _reranker: Reranker = PrivateAttr()

    def __init__(
        self,
        model: str | Reranker,
        *,
        top_n: int | None = None,
        metadata_mode: MetadataMode = MetadataMode.EMBED,
        **options: Any,
    ) -> None:
        super().__init__()
        self.top_n = top_n
        self.metadata_mode = metadata_mode
        self._reranker = open_reranker(model, options)

    @classmethod
    def class_name(cls) -> str:
        """Return the name under which LlamaIndex knows the class."""
        return "QpeftRerank"

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        """Return new scored nodes, best first; those given keep their scores.

        Raises:
            InputError: there is no query.
            QueryError: the query is empty or does not fit the model.
        """
        if query_bundle is None:
            raise InputError("reranking needs a query: query_bundle or query_str")
        texts = [node.node.get_content(metadata_mode=self.metadata_mode) for node in nodes]
        ranked = self._reranker.rank(query_bundle.query_str, texts, top_k=self.top_n)
        return [NodeWithScore(node=nodes[entry["corpus_id"]].node, score=entry["score"]) for entry in ranked]
