"""Adapters small enough for the tiny models, and rows for them."""

from __future__ import annotations

import torch

from qpeft import adapters
from qpeft.lm.causal import CausalLM
from qpeft.lm.context_store import ContextStore
from qpeft.template import Prompt, Template, load_template
from qpeft.types import Passage, Query

CHANGES_THE_MODEL = {"lora"}
"""These write no hints; they have tests of their own."""
NAMES = [name for name in adapters.available() if name not in CHANGES_THE_MODEL]
SMALL = {
    "passage_prompt": {"k": 3, "attn_dim": 16, "mlp_hidden": 8},
    "qpeft_a": {"attn_dim": 16, "mlp_hidden": 8},
    "qpeft_c": {"attn_dim": 16, "mlp_hidden": 8},
    "qpeft_r": {"k": 4, "mlp_hidden": 8},
    "soft_prompt": {"length": 5},
}
BEFORE = Template("before", 1, "given the {hint} passage: {passage}", "question: {query}")
QUERIES = (Query("q1", "why is the sky blue?"), Query("q2", "who"))
PASSAGES = (
    Passage("short", "the sky."),
    Passage(
        "long", "the light of the sky is blue, the sea is salty, and the moon made the tide in the water of the sea"
    ),
    Passage("titled", "an octopus was long", "octopus"),
    Passage("other", "the old king of the city was in the river, the new king on the lake"),
)


def build(name, lm, *, seed=0, trained=False, authors=False, **options):
    """Return an adapter in evaluation mode; `trained` moves every parameter, so that none is without influence."""
    module = adapters.load(name)
    small = {} if authors else SMALL.get(name, {})
    torch.manual_seed(seed)
    adapter = module.build((module.Authors if authors else module.Config)(**(small | options)), lm)
    if trained:
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return adapter.eval()


def rows_for(lm, adapter, template="plain", queries=QUERIES, passages=PASSAGES):
    """Return the rows of all pairs."""
    made = template if isinstance(template, Template) else load_template(template)
    prompt = Prompt(made, lm.tokenizer, lm.max_length, hint_length=adapter.hint_length)
    return [prompt.rows(query, passage)[0] for query in queries for passage in passages]


def with_store(lm, capacity=1 << 28, *, tokenizer=None, **options):
    """Return the same model that keeps encoded contexts."""
    return alike(lm, tokenizer=tokenizer, store=ContextStore(capacity), **options)


def alike(lm, *, model=None, tokenizer=None, batch_tokens=4096, **options):
    """Return the same model with other options."""
    return CausalLM(
        model or lm.model,
        tokenizer or lm.tokenizer,
        name=lm.name,
        max_length=lm.max_length,
        batch_tokens=batch_tokens,
        **options,
    )
