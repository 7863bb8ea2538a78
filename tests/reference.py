"""Query likelihood as one would write it first: one pair, no padding, no batch, float64, full logits, a loop."""

from __future__ import annotations

import copy

import torch

from qpeft.adapter import Pairs


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


@torch.no_grad()
def naive_hinted_log_probs(model, row, vectors):
    """Return the log-probabilities of a row's scored target tokens with vectors `[L, d]` in their place, as a list."""
    exact = copy.deepcopy(model).double()
    exact.config._experts_implementation = "eager"
    place = len(row.context) if row.hint is None else row.hint
    ids = (*row.context[:place], *[0] * len(vectors), *row.context[place:], *row.target)

    def write(module, given, embedded):
        return torch.cat([embedded[:, :place], vectors.double()[None], embedded[:, place + len(vectors) :]], 1)

    exact.get_input_embeddings().register_forward_hook(write)
    logits = exact(input_ids=torch.tensor([ids])).logits[0]
    start = len(row.context) + len(vectors)
    return [
        float(torch.log_softmax(logits[start + k - 1], 0)[token])
        for k, (token, scored) in enumerate(zip(row.target, row.scored, strict=True))
        if scored
    ]


@torch.no_grad()
def naive_hints(model, adapter, row):
    """Return the vectors `[L, d]` that an adapter writes for one row, from its passage alone and without padding."""
    start, end = row.passage
    states = None
    if adapter.reads_layer is not None:
        out = model(input_ids=torch.tensor([row.context]), output_hidden_states=True)
        states = out.hidden_states[adapter.reads_layer][:, start:end]
    query, passage = torch.tensor([row.query]), torch.tensor([row.context[start:end]])
    pairs = Pairs(query, torch.ones_like(query).bool(), passage, torch.ones_like(passage).bool(), states)
    hints = adapter(pairs)
    return hints.vectors[hints.mask]


@torch.no_grad()
def naive_read(model, row, read, vectors=None):
    """Return what is read at a row's last token, as a list, with vectors `[L, d]` in their place.

    `read`: tokens, whose log-probabilities are returned, or the weight `[k, d]` of a head on the last state.
    """
    exact = copy.deepcopy(model).double()
    exact.config._experts_implementation = "eager"
    place = len(row.context) if vectors is None else row.hint
    embed = exact.get_input_embeddings()
    pieces = [embed(torch.tensor(ids, dtype=torch.long)) for ids in (row.context[:place], row.context[place:])]
    if vectors is not None:
        pieces.insert(1, vectors.double())
    inputs = torch.cat(pieces)[None]
    if isinstance(read, torch.Tensor):
        state = exact.base_model(inputs_embeds=inputs).last_hidden_state[0, -1]
        return [float(state @ weight) for weight in read.double()]
    logits = exact(inputs_embeds=inputs).logits[0, -1]
    return [float(torch.log_softmax(logits, 0)[token]) for token in read]
