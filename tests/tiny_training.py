"""A toy to train on: queries, their passages, and what training needs around them."""

from __future__ import annotations

import torch

from qpeft.methods.query_likelihood import Config, QueryLikelihood
from qpeft.template import Prompt, load_template
from qpeft.training.config import TrainingConfig
from qpeft.training.dev import DevRanking
from qpeft.training.trainer import Collator, Learner
from qpeft.types import Candidates, Group, Passage, Query

TEXTS = {
    "sky": "the blue sky is in the light of the air",
    "sea": "the salty sea and its tide",
    "octopus": "the octopus has three heart",
    "king": "the old king of the city",
    "lion": "the lion and the red cat",
    "river": "a long river from the lake",
}
PASSAGES = {name: Passage(name, text) for name, text in TEXTS.items()}
ASKED = {"sky": "why is the sky blue", "sea": "salty tide", "octopus": "three heart", "king": "who was the old king"}
GROUPS = [
    Group(Query(name, text), (PASSAGES[name],), tuple(p for other, p in PASSAGES.items() if other != name))
    for name, text in ASKED.items()
]
FAST = {"epochs": 3, "batch_queries": 2, "negatives": 2, "evaluations": 6, "warmup": 0.0}


def prompt_for(lm, adapter, template="plain"):
    return Prompt(load_template(template), lm.tokenizer, lm.max_length, hint_length=adapter.hint_length)


def scorer_for(lm, adapter, template="plain"):
    return QueryLikelihood(Config(), lm, prompt_for(lm, adapter, template), adapter)


def dev_for(scorer, measure="RR@10"):
    items = [Candidates(group.query, (*group.positives, *group.negatives)) for group in GROUPS]
    qrels = {group.query.id: {group.query.id: 1} for group in GROUPS}
    return DevRanking(scorer, items, qrels, measure)


def batch_for(lm, adapter, **options):
    config = TrainingConfig(**(FAST | options))
    return Collator(scorer_for(lm, adapter), config, 0)([(0, group) for group in GROUPS])["batch"], config


def step(lm, adapter, **options):
    """Return loss, scores and gradient of a training step over all groups, on the CPU."""
    adapter.zero_grad()
    batch, config = batch_for(lm, adapter, **options)
    out = Learner(adapter, config, scorer_for(lm, adapter))(batch)
    out["loss"].backward()
    gradient = torch.cat([p.grad.flatten() for p in adapter.parameters() if p.grad is not None])
    return out["loss"].detach().cpu(), out["scores"].detach().cpu(), gradient.cpu()
