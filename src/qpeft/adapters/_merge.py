"""LoRA added to the weights of its model, which then needs neither the adapter nor peft.

    W + (alpha / r) · B A

A classifier becomes transformers' own class for it, where the architecture has one whose head reads the last token;
elsewhere its head is kept beside the language model's tensors, under the same name.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from qpeft.adapters._folder import AdapterFolder
from qpeft.adapters._lora import HEAD, LoraAdapter
from qpeft.errors import OptionError
from qpeft.lm.causal import CausalLM
from qpeft.lm.read_out import WEIGHT


def merge(lm: CausalLM, opened: AdapterFolder) -> tuple[Any, dict[str, Tensor]]:
    """Add an adapter to its model for good.

    Returns:
        A model of the transformers library, and tensors that are to be saved beside its own.

    Raises:
        OptionError: the adapter writes vectors into the input, or the model's weights are quantised.
    """
    adapter = opened.adapter
    if not isinstance(adapter, LoraAdapter) or adapter.qpeft is not None:
        hint = f" with the hint {adapter.config.hint}" if isinstance(adapter, LoraAdapter) else ""
        raise OptionError(
            f"adapter {opened.name!r}{hint} cannot be merged: it writes vectors into the input, which are no change of "
            "the model's weights"
        )
    if getattr(lm.model, "is_quantized", False):
        raise OptionError("a quantised model cannot be merged: open it with --quantization none")
    head = lm.head if adapter.head is None else adapter.head
    adapter.merge(lm)
    if head is None:
        return lm.model, {}
    weight = next(head.module.parameters()).detach().to(lm.model.dtype)
    if lm.has_words:
        made = _classifier(lm)
        if made is None:
            return lm.model, {WEIGHT: weight}
        lm.model = made
    lm.model.get_submodule(HEAD).weight = torch.nn.Parameter(weight, requires_grad=False)
    return lm.model, {}


def _classifier(lm: CausalLM) -> Any:
    """Return transformers' classifier around the model's layers; None where it has none that reads the last token."""
    config = copy.deepcopy(lm.model.config)
    config.num_labels = 1
    if config.pad_token_id is None:  # transformers finds the last token by it
        tokenizer = lm.tokenizer
        others = (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.eos_token_id)
        config.pad_token_id = next((token for token in others if token is not None), 0)
    if type(config) not in AutoModelForSequenceClassification._model_mapping:
        return None
    with torch.device("meta"):
        auto: Any = AutoModelForSequenceClassification
        made: Any = auto.from_config(config)
    if not isinstance(getattr(made, HEAD, None), torch.nn.Linear):
        return None
    setattr(made, made.base_model_prefix, lm.model.base_model)
    return made.eval()
