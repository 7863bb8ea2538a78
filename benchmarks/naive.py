"""The straightforward way to score queries, as published scripts for query likelihood do it.

Prompts are tokenised together and padded to the longest of their batch; the model writes logits at every position;
their log-softmax is taken whole, and the query's tokens are picked from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from qpeft.types import Candidates

PROMPT = "Passage: {title} {text}\nQuestion:"
"""What the template `plain` says."""


class Loop:
    """Scores candidates in the order given.

    Args:
        model: a causal model of the transformers library.
        tokenizer: its tokenizer.
        rows: candidates in a batch.
    """

    def __init__(self, model: Any, tokenizer: Any, rows: int) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.rows = rows

    @torch.inference_mode()
    def __call__(self, items: Sequence[Candidates]) -> list[float]:
        """Return the mean log-probability of the query's tokens, for each pair."""
        scores: list[float] = []
        for ids, mask, target in self._batches(items):
            logits = self.model(input_ids=ids, attention_mask=mask).logits
            log_probs = torch.log_softmax(logits[:, :-1].float(), -1)
            chosen = log_probs.gather(-1, ids[:, 1:, None])[..., 0]
            scored = target[:, 1:]
            scores += ((chosen * scored).sum(1) / scored.sum(1)).tolist()
        return scores

    def _batches(self, items: Sequence[Candidates]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield ids, mask and what is scored, each `[B, T]`."""
        first = [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]
        for item in items:
            query = self.tokenizer(item.query.text, add_special_tokens=False)["input_ids"]
            for start in range(0, len(item.passages), self.rows):
                some = item.passages[start : start + self.rows]
                prompts = self.tokenizer(
                    [PROMPT.format(title=passage.title, text=passage.text) for passage in some],
                    add_special_tokens=False,
                )["input_ids"]
                rows = [[*first, *prompt, *query] for prompt in prompts]
                width = max(map(len, rows))
                ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
                lengths = torch.tensor([len(row) for row in rows])[:, None]
                place = torch.arange(width)[None]
                mask = (place < lengths).long()
                target = (place >= lengths - len(query)) & (place < lengths)
                device = self.model.device
                yield ids.to(device), mask.to(device), target.to(device)


def logits_bytes(vocabulary: int, rows: int, width: int) -> int:
    """Return what the float32 log-probabilities of a batch take."""
    return rows * width * vocabulary * 4
