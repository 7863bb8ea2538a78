r"""Which layers LoRA changes, by the model's architecture.

A layer is named by the tail of its path, as a regular expression: `q_proj` is every layer of that name, and
`mlp\.c_proj` only the one within `mlp`. Experts that are stacked into one tensor are named as parameters, not layers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from qpeft.errors import OptionError, nearest


@dataclass(frozen=True, slots=True)
class Parts:
    """Tails of the paths of an architecture's layers, and of the parameters that hold experts."""

    attention: tuple[str, ...]
    mlp: tuple[str, ...]
    experts: tuple[str, ...] = ()


_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_GATED = Parts(_ATTENTION, ("gate_proj", "up_proj", "down_proj"))
ARCHITECTURES = {
    **dict.fromkeys(
        ("llama", "mistral", "ministral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "olmo2", "smollm3"),
        _GATED,
    ),
    "phi3": Parts(("qkv_proj", "o_proj"), ("gate_up_proj", "down_proj")),
    "gpt2": Parts(("c_attn", r"attn\.c_proj"), ("c_fc", r"mlp\.c_proj")),
    "gpt_neox": Parts(("query_key_value", r"attention\.dense"), ("dense_h_to_4h", "dense_4h_to_h")),
    "bert": Parts(
        (r"self\.query", r"self\.key", r"self\.value", r"attention\.output\.dense"),
        (r"intermediate\.dense", r"\d+\.output\.dense"),
    ),
    "mixtral": Parts(_ATTENTION, (), (r"experts\.gate_up_proj", r"experts\.down_proj")),
}
"""By `model_type`."""


@dataclass(frozen=True, slots=True)
class Targets:
    """Full names of what is changed in one model."""

    layers: tuple[str, ...]
    parameters: tuple[str, ...]
    transposed: bool
    """Whether the layers hold their weights as (in, out), as GPT-2's do."""


def resolve(modules: str, model: nn.Module) -> Targets:
    """Return the layers that `modules` means in a model: all, attention, mlp, or names of layers with commas.

    Raises:
        OptionError: an architecture without a table, or a name that no layer has; says which names there are.
    """
    linear = linear_layers(model)
    wanted, experts = _tails(modules, model, linear)
    layers: dict[str, None] = {}
    for tail in wanted:
        found = [name for name in linear if re.fullmatch(rf"(.*\.)?{tail}", name)]
        if not found:
            name, known = tail.replace("\\", ""), leaf_names(linear)
            raise OptionError(f"--modules: no linear layer of the model is named {name!r}{nearest(name, known)}")
        layers |= dict.fromkeys(found)
    names = [name.replace(".base_layer", "") for name, _ in model.named_parameters()]
    parameters = [name for name in names if any(re.fullmatch(rf".*\.{tail}", name) for tail in experts)]
    if experts and not parameters:
        raise OptionError("--modules: this model's experts are not stacked tensors; take attention")
    kinds = {isinstance(linear[name], Conv1D) for name in layers}
    if len(kinds) > 1:
        raise OptionError("--modules: layers that hold their weights in different orders cannot be changed together")
    return Targets(tuple(layers), tuple(parameters), kinds == {True})


def linear_layers(model: Any) -> dict[str, nn.Module]:
    """Return a model's linear layers by their paths, without the head, under the names that they have without LoRA."""
    head = model.get_output_embeddings()
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        inner = getattr(module, "base_layer", module)  # once LoRA is in place, it stands in the layer's stead
        if isinstance(inner, (nn.Linear, Conv1D)) and inner is not head and ".lora_" not in path:
            found[path.replace(".base_layer", "")] = inner
    return found


def leaf_names(layers: Sequence[str] | dict[str, nn.Module]) -> list[str]:
    """Return the last words of paths, each once, in the model's order."""
    return list(dict.fromkeys(name.rpartition(".")[2] for name in layers))


def _tails(modules: str, model: Any, linear: dict[str, nn.Module]) -> tuple[Sequence[str], Sequence[str]]:
    if modules not in ("all", "attention", "mlp"):
        names = [re.escape(name.strip()) for name in modules.split(",") if name.strip()]
        if not names:
            raise OptionError("--modules is empty: all, attention, mlp, or names of linear layers")
        return names, ()
    kind = model.config.get_text_config().model_type
    parts = ARCHITECTURES.get(kind)
    if parts is None:
        known = ", ".join(leaf_names(linear))
        raise OptionError(
            f"--modules {modules}: the architecture {kind!r} is not known; name its linear layers: {known}"
        )
    if modules == "attention":
        return parts.attention, ()
    return (parts.mlp if modules == "mlp" else parts.attention + parts.mlp), parts.experts
