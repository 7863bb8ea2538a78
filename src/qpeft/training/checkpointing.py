"""The memory of a step: what to do where it does not suffice, and layers that are computed again instead of kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from qpeft.adapter import Adapter
from qpeft.errors import OptionError
from qpeft.lm.causal import CausalLM
from qpeft.lm.pretrained import within_memory


@contextmanager
def checkpointed(lm: CausalLM, adapter: Adapter) -> Iterator[None]:
    """Let the model recompute its layers within this context.

    The adapter has been switched off again when the backward pass begins, so each recomputation switches it on. No
    contexts are kept meanwhile: such layers take none.

    Raises:
        OptionError: the adapter reads passages that are encoded already, or the architecture cannot do it.
    """
    if not adapter.changes_lm:
        raise OptionError("--gradient-checkpointing is for --adapter lora; others train over encoded passages")
    layers = [module for module in lm.model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers or not lm.model.supports_gradient_checkpointing:
        raise OptionError(f"--gradient-checkpointing: {lm.name} has no layers that can be computed again")
    options = {"use_reentrant": False, "context_fn": lambda: (nullcontext(), adapter.applied())}
    lm.model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    store, lm.store = lm.store, None
    for layer in layers:
        layer.training = True  # of itself alone: what is within stays without dropout
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False
        lm.store = store
        lm.model.activation_checkpointing_disable()


@contextmanager
def room_on(device: torch.device) -> Iterator[None]:
    """Say which options make a step smaller where it does not fit.

    Raises:
        OptionError: memory ran out within this context.
    """
    said = (
        f"a step does not fit in the memory of {device}: lower --batch-queries and raise --gradient-accumulation "
        "instead, or, with lora, add --gradient-checkpointing"
    )
    with within_memory(OptionError(said)):
        yield
