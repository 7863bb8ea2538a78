"""Query likelihood as one would write it first: one pair, no padding, no batch, float64, full logits, a loop."""

from __future__ import annotations

import copy

import torch


@torch.inference_mode()
def naive_log_probs(model, row):
    """Return the log-probabilities of a row's scored target tokens, and of its passage tokens, as lists."""
    exact = copy.deepcopy(model).double()
    exact.config._experts_implementation = "eager"  # the grouped kernel knows no float64
    ids = [*row.context, *row.target]
    logits = exact(input_ids=torch.tensor([ids])).logits[0]
    at = [float(torch.log_softmax(logits[t - 1], 0)[ids[t]]) if t else None for t in range(len(ids))]
    start = len(row.context)
    target = [at[start + k] for k, scored in enumerate(row.scored) if scored]
    passage = [at[t] for t in range(*row.passage) if t]
    return target, passage
