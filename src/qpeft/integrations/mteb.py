"""A reranker as an mteb cross-encoder (`mteb.CrossEncoderProtocol`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from qpeft.errors import MissingDependencyError
from qpeft.integrations._opening import open_reranker
from qpeft.types import Reranker

try:
    from mteb.models import ModelMeta
except ImportError as error:
    raise MissingDependencyError("mteb", "mteb") from error

if TYPE_CHECKING:
    from mteb.abstasks.task_metadata import TaskMetadata
    from mteb.types import BatchedInput, PromptType
    from torch.utils.data import DataLoader


class QpeftCrossEncoder:
    """Reranks in mteb's reranking tasks, and in the second stage of its two-stage retrieval.

    Args:
        model: a ready reranker, or the first argument of `Reranker.from_pretrained`.
        name: `organisation/name` under which mteb keeps results. It finds results again by this name, so another
            adapter, template or method needs another one.
        options: the other arguments of `Reranker.from_pretrained`.
    """

    def __init__(self, model: str | Reranker, *, name: str, **options: Any) -> None:
        self.reranker = open_reranker(model, options)
        self.mteb_model_meta = ModelMeta.create_empty({"name": name, "model_type": ["cross-encoder"]})

    def predict(
        self,
        inputs1: DataLoader[BatchedInput],
        inputs2: DataLoader[BatchedInput],
        *,
        task_metadata: TaskMetadata,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        **kwargs: Any,
    ) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Return a score per pair `[pairs]`; mteb puts a document's title in front of its text.

        Args:
            inputs1: batches whose `text` are queries.
            inputs2: batches whose `text` are passages, as many.
            task_metadata: not used.
            hf_split: not used.
            hf_subset: not used.
            prompt_type: not used.
            kwargs: `batch_size` and the like, not used: batches are filled by tokens.
        """
        queries = [text for batch in inputs1 for text in batch["text"]]
        passages = [text for batch in inputs2 for text in batch["text"]]
        return np.array(self.reranker.predict(list(zip(queries, passages, strict=True))), dtype=np.float32)
