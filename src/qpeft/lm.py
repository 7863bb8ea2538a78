"""Frozen language models that say how likely given tokens are.

Shapes: `B` rows, `T` positions, `N` scored positions of a batch, `K` scored positions of a row, `V` vocabulary.

Rows are sorted by length, padded within batches that hold a bounded number of tokens, and come back in the order given.
Positions are explicit and padding is masked, so that a row's values do not depend on its company. The model's own head
runs at the scored positions only, which keeps the memory small and soft-capped or scaled heads right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from qpeft.errors import ModelError
from qpeft.template import Row

PaddingSide = Literal["left", "right"]


@dataclass(frozen=True, slots=True)
class RowLogProbs:
    """Natural log-probabilities of a row's tokens, float32 on the CPU.

    `target` `[K]` are the scored target tokens; `passage` `[m]` the passage's tokens, where they were asked for.
    """

    target: Tensor
    passage: Tensor | None = None


class LanguageModel(Protocol):
    """What methods need of a model."""

    name: str
    tokenizer: Any
    max_length: int
    has_encoder: bool

    @property
    def device(self) -> torch.device:
        """Where inputs are sent."""
        ...

    @property
    def dtype(self) -> str:
        """Name of the weights' type."""
        ...

    @property
    def revision(self) -> str | None:
        """Commit on the model hub, if the model came from there."""
        ...

    def log_probs(self, rows: Sequence[Row], *, with_passage: bool = False) -> list[RowLogProbs]:
        """Return the log-probabilities of each row's scored tokens, in order."""
        ...


class PretrainedLM:
    """What decoder-only and encoder-decoder models share: batches, memory, order."""

    has_encoder: bool

    def __init__(self, model: Any, tokenizer: Any, *, name: str, max_length: int, batch_tokens: int) -> None:
        self.name = name
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.model = model.eval().requires_grad_(False)
        self._batch_tokens = batch_tokens
        self._budget = batch_tokens  # halved when memory runs out, grows back afterwards

    @property
    def device(self) -> torch.device:
        """Where inputs are sent."""
        return torch.device(self.model.device)

    @property
    def dtype(self) -> str:
        """Name of the weights' type, as the option `--dtype` spells it."""
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def revision(self) -> str | None:
        """Commit on the model hub, if the model came from there."""
        commit: str | None = getattr(self.model.config, "_commit_hash", None)
        return commit

    @torch.inference_mode()
    def log_probs(self, rows: Sequence[Row], *, with_passage: bool = False) -> list[RowLogProbs]:
        """Return the log-probabilities of each row's scored tokens, in order.

        Args:
            rows: token ids, of any lengths.
            with_passage: also return those of the passage's tokens (decoder-only models).

        Raises:
            ModelError: a single row does not fit in memory.
        """
        results: list[RowLogProbs | None] = [None] * len(rows)
        # Longest first, so that what does not fit shows right away.
        waiting = sorted(range(len(rows)), key=lambda i: (len(rows[i]), -i))
        while waiting:
            count = min(len(waiting), max(1, self._budget // max(1, len(rows[waiting[-1]]))))
            chosen = waiting[-count:][::-1]
            try:
                values = self._forward([rows[i] for i in chosen], with_passage)
            except torch.OutOfMemoryError as error:
                if count == 1:
                    raise ModelError(
                        f"{len(rows[chosen[0]])} tokens do not fit in the memory of {self.device}"
                    ) from error
                torch.cuda.empty_cache()
                self._budget = count * len(rows[chosen[0]]) // 2
                continue
            del waiting[-count:]
            for i, value in zip(chosen, values, strict=True):
                results[i] = value
        self._budget = min(self._batch_tokens, self._budget * 2)
        return [result for result in results if result is not None]

    def _forward(self, rows: Sequence[Row], with_passage: bool) -> list[RowLogProbs]:
        raise NotImplementedError


class CausalLM(PretrainedLM):
    """Any decoder-only model of the transformers library.

    Args:
        model: an `AutoModelForCausalLM`.
        tokenizer: its tokenizer.
        name: how it is named in messages and provenance.
        max_length: tokens that a row may have.
        batch_tokens: padded tokens that a forward may have.
        padding_side: where short rows are padded; the scores do not depend on it.
    """

    has_encoder = False

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        name: str,
        max_length: int,
        batch_tokens: int,
        padding_side: PaddingSide = "left",
    ) -> None:
        super().__init__(model, tokenizer, name=name, max_length=max_length, batch_tokens=batch_tokens)
        self.padding_side = padding_side

    def _forward(self, rows: Sequence[Row], with_passage: bool) -> list[RowLogProbs]:
        width = max(len(row) for row in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        predicted = torch.zeros(len(rows), width, dtype=torch.bool)
        for i, row in enumerate(rows):
            start = width - len(row) if self.padding_side == "left" else 0
            ids[i, start : start + len(row)] = torch.tensor((*row.context, *row.target))
            mask[i, start : start + len(row)] = 1
            predicted[i, start + len(row.context) : start + len(row)] = torch.tensor(row.scored)
            if with_passage:
                predicted[i, start + row.passage[0] : start + row.passage[1]] = True
                predicted[i, start] = False  # without BOS, the first token has nothing to be predicted from
        # The token at position t is predicted by the state at t - 1.
        keep = predicted.roll(-1, dims=1).to(self.device)
        logits = self.model(
            input_ids=ids.to(self.device),
            attention_mask=mask.to(self.device),
            position_ids=(mask.cumsum(1) - 1).clamp(min=0).to(self.device),
            use_cache=False,
            logits_to_keep=keep,
        ).logits
        values = token_log_probs(logits.reshape(-1, logits.shape[-1]), ids[predicted].to(self.device)).cpu()
        counts = predicted.sum(1).tolist()
        out = []
        for row, value in zip(rows, torch.split(values, counts), strict=True):
            border = len(value) - sum(row.scored)
            out.append(RowLogProbs(value[border:], value[:border] if with_passage else None))
        return out


class EncoderDecoderLM(PretrainedLM):
    """Any encoder-decoder model of the transformers library (T5, T0, Flan-T5, BART …), as UPR uses them.

    Source: Sachan et al. 2022, arXiv 2204.07496.
    """

    has_encoder = True

    def _forward(self, rows: Sequence[Row], with_passage: bool) -> list[RowLogProbs]:
        if with_passage:
            raise ModelError(f"{self.name}: an encoder-decoder gives no probability of the passage")
        contexts, context_mask = _pad([row.context for row in rows])
        targets, target_mask = _pad([row.target for row in rows])
        start = torch.full((len(rows), 1), self.model.config.decoder_start_token_id)
        logits = self.model(
            input_ids=contexts.to(self.device),
            attention_mask=context_mask.to(self.device),
            decoder_input_ids=torch.cat([start, targets[:, :-1]], 1).to(self.device),
            decoder_attention_mask=target_mask.to(self.device),
            use_cache=False,
        ).logits
        scored, _ = _pad([[int(s) for s in row.scored] for row in rows])
        scored = scored.bool()
        values = token_log_probs(logits[scored.to(self.device)], targets[scored].to(self.device)).cpu()
        return [RowLogProbs(value) for value in torch.split(values, scored.sum(1).tolist())]


def _pad(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Right-pad with zeros: ids `[B, T]` and mask `[B, T]`."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return ids, mask


def token_log_probs(logits: Tensor, tokens: Tensor, chunk: int = 128) -> Tensor:
    """Return `log softmax(logits)[tokens]` in float32.

    Args:
        logits: `[N, V]`, any floating dtype.
        tokens: `[N]`.
        chunk: positions that are converted to float32 at a time.

    Returns:
        `[N]`.

    """
    parts = []
    for some, chosen in zip(torch.split(logits, chunk), torch.split(tokens, chunk), strict=True):
        exact = some.float()
        parts.append(exact.gather(1, chosen[:, None]).squeeze(1) - exact.logsumexp(1))
    return torch.cat(parts) if parts else logits.new_zeros(0, dtype=torch.float32)
