"""The straightforward way to score queries, as published scripts for query likelihood do it.

Prompts are tokenised together and padded to the longest of their batch; the model writes logits at every position;
their log-softmax is taken whole, and the query's tokens are picked from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

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

    def __call__(self, items: Sequence[Candidates]) -> list[float]:
        """Return the mean log-probability of the query's tokens, for each pair."""
        first = [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]
        scores: list[float] = []
        for item in items:
            query = self.tokenizer(item.query.text, add_special_tokens=False)["input_ids"]
            for start in range(0, len(item.passages), self.rows):
                prompts = self.tokenizer(
                    [PROMPT.format(title=p.title, text=p.text) for p in item.passages[start : start + self.rows]],
                    add_special_tokens=False,
                )["input_ids"]
                rows = [[*first, *prompt, *query] for prompt in prompts]
                scores += padded_scores(self.model, rows, [len(query)] * len(rows))
        return scores


@torch.inference_mode()
def padded_scores(
    model: Any, rows: Sequence[Sequence[int]], targets: Sequence[int], dtype: torch.dtype = torch.float32
) -> list[float]:
    """Return the mean log-probability of each row's last tokens.

    Args:
        model: a causal model of the transformers library.
        rows: token ids; all go into one batch.
        targets: how many tokens of each row are scored.
        dtype: of the log-softmax.
    """
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=model.device)
    lengths = torch.tensor([len(row) for row in rows], device=model.device)[:, None]
    firsts = lengths - torch.tensor(targets, device=model.device)[:, None]
    place = torch.arange(width, device=model.device)[None]
    logits = model(input_ids=ids, attention_mask=(place < lengths).long(), use_cache=False).logits
    log_probs = torch.log_softmax(logits[:, :-1].to(dtype), -1)
    chosen = log_probs.gather(-1, ids[:, 1:, None])[..., 0].float()
    scored = ((place >= firsts) & (place < lengths))[:, 1:]
    means: list[float] = ((chosen * scored).sum(1) / scored.sum(1)).tolist()
    return means


def logits_bytes(vocabulary: int, rows: int, width: int) -> int:
    """Return what the float32 log-probabilities of a batch take."""
    return rows * width * vocabulary * 4
