"""A reranker in the place of sentence-transformers' `CrossEncoder`, for its evaluators and BEIR's `Rerank`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from qpeft.errors import MissingDependencyError, OptionError
from qpeft.integrations._opening import open_reranker
from qpeft.types import RankedPassage, Reranker, as_list

try:
    import torch
    from sentence_transformers.cross_encoder.model_card import CrossEncoderModelCardData
except ImportError as error:
    raise MissingDependencyError("sentence-transformers", "dense") from error

Pairs = Sequence[Sequence[str]]


class CrossEncoder:
    """Answers `predict` and `rank` as a sentence-transformers `CrossEncoder` with one label does.

    Scores are the method's own (query likelihood: nats per query token), not squeezed into [0, 1]; give `activation_fn`
    where they must be. `batch_size` and `show_progress_bar` are accepted and not used: batches are filled by tokens
    (`batch_tokens`).

    Args:
        model: a ready reranker, or the first argument of `Reranker.from_pretrained`.
        options: the other arguments of `Reranker.from_pretrained`.
    """

    num_labels = 1

    def __init__(self, model: str | Reranker, **options: Any) -> None:
        self.reranker = open_reranker(model, options)
        self.model_card_data = CrossEncoderModelCardData()  # where evaluators leave their results

    def predict(
        self,
        inputs: Pairs | Sequence[str] | None = None,
        *,
        sentences: Pairs | Sequence[str] | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        activation_fn: Callable[[torch.Tensor], torch.Tensor] | None = None,
        apply_softmax: bool | None = False,
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        **others: Any,
    ) -> Any:
        """Return a score per (query, passage) pair.

        Args:
            inputs: pairs, or a single one.
            sentences: the older name of `inputs`.
            batch_size: not used.
            show_progress_bar: not used.
            activation_fn: is given the scores `[pairs]`, float32, and returns as many.
            apply_softmax: without effect, as for any model with one label.
            convert_to_numpy: return a numpy array `[pairs]`, else a list of tensors.
            convert_to_tensor: return a tensor `[pairs]`.
            others: `prompt`, `device` and whatever else `CrossEncoder` has; only None.

        Raises:
            OptionError: an argument that is not None and means nothing here.
        """
        for name, value in others.items():
            if value is not None:
                raise OptionError(f"{name}={value!r}: not an option of scoring; what there is, is given on opening")
        pairs = inputs if inputs is not None else sentences
        if pairs is None:
            raise OptionError("predict needs pairs of query and passage")
        pairs = as_list(pairs, "pairs")
        single = len(pairs) > 0 and isinstance(pairs[0], str)
        asked: Any = [pairs] if single else pairs
        scores = torch.tensor(self.reranker.predict(asked), dtype=torch.float32)
        if activation_fn is not None:
            scores = activation_fn(scores)
        found: Any = scores if convert_to_tensor else scores.numpy() if convert_to_numpy else list(scores)
        return found[0] if single else found

    def rank(
        self,
        query: str,
        documents: Sequence[str],
        top_k: int | None = None,
        return_documents: bool = False,
        **others: Any,
    ) -> list[RankedPassage]:
        """Rank texts, best first; see `Reranker.rank` for what comes back, and `predict` for the other arguments.

        Scores come back as numbers, whatever `convert_to_numpy` and `convert_to_tensor` say.
        """
        documents = as_list(documents, "documents")
        others = {**others, "convert_to_tensor": True}
        scores = self.predict([(query, text) for text in documents], **others).tolist()
        order = sorted(range(len(scores)), key=lambda index: -scores[index])
        ranked = [RankedPassage(corpus_id=index, score=scores[index]) for index in order[:top_k]]
        if return_documents:
            for entry in ranked:
                entry["text"] = documents[entry["corpus_id"]]
        return ranked
