"""A reranker as a LangChain document compressor; needs `langchain-core` only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qpeft.errors import MissingDependencyError
from qpeft.integrations._opening import open_reranker
from qpeft.types import Reranker

try:
    from langchain_core.callbacks import Callbacks
    from langchain_core.documents import BaseDocumentCompressor, Document
    from pydantic import PrivateAttr
except ImportError as error:
    raise MissingDependencyError("langchain-core", "langchain") from error


class QpeftRerank(BaseDocumentCompressor):
    """Orders retrieved documents, and notes each one's score in `metadata["relevance_score"]`.

    `acompress_documents` does the same in a thread. Concurrent calls take turns at the model.

    Args:
        model: a ready reranker, or the first argument of `Reranker.from_pretrained`.
        top_n: how many documents stay; None: all.
        options: the other arguments of `Reranker.from_pretrained`.
    """

    top_n: int | None = None
    _reranker: Reranker = PrivateAttr()

    def __init__(self, model: str | Reranker, *, top_n: int | None = None, **options: Any) -> None:
        super().__init__()
        self.top_n = top_n
        self._reranker = open_reranker(model, options)

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> Sequence[Document]:
        """Return copies of the documents, best first; those given are left as they are.

        Raises:
            QueryError: the query is empty or does not fit the model.
        """
        ranked = self._reranker.rank(query, [document.page_content for document in documents], top_k=self.top_n)
        return [_scored(documents[entry["corpus_id"]], entry["score"]) for entry in ranked]


def _scored(document: Document, score: float) -> Document:
    return document.model_copy(update={"metadata": {**document.metadata, "relevance_score": score}})
