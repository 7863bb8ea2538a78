r"""Which layers LoRA changes, by the model's architecture, and where in the model each of them stands.

A layer is named by the tail of its path, as a regular expression: `q_proj` is every layer of that name, and
`mlp\.c_proj` only the one within `mlp`. Experts that are stacked into one tensor are named as parameters, not layers.

A projection is what a layer does, under one name for all architectures: q, k, v, o, gate, up, down; qkv and gate_up
where one layer does the work of several. An MLP without a gate has up and down alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn
from transformers.pytorch_utils import Conv1D

from qpeft.errors import OptionError, nearest

Component = Literal["attention", "mlp"]


@dataclass(frozen=True, slots=True)
class Parts:
    """Tail of a layer's path → its projection, for an architecture; `experts` are parameters, and belong to the MLP."""

    attention: Mapping[str, str]
    mlp: Mapping[str, str]
    experts: Mapping[str, str] = field(default_factory=dict)


_ATTENTION = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o"}
_GATED = Parts(_ATTENTION, {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"})
ARCHITECTURES = {
    **dict.fromkeys(
        ("llama", "mistral", "ministral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "olmo2", "smollm3"),
        _GATED,
    ),
    "phi3": Parts({"qkv_proj": "qkv", "o_proj": "o"}, {"gate_up_proj": "gate_up", "down_proj": "down"}),
    "gpt2": Parts({"c_attn": "qkv", r"attn\.c_proj": "o"}, {"c_fc": "up", r"mlp\.c_proj": "down"}),
    "gpt_neox": Parts(
        {"query_key_value": "qkv", r"attention\.dense": "o"}, {"dense_h_to_4h": "up", "dense_4h_to_h": "down"}
    ),
    "bert": Parts(
        {r"self\.query": "q", r"self\.key": "k", r"self\.value": "v", r"attention\.output\.dense": "o"},
        {r"intermediate\.dense": "up", r"\d+\.output\.dense": "down"},
    ),
    "mixtral": Parts(_ATTENTION, {}, {r"experts\.gate_up_proj": "gate_up", r"experts\.down_proj": "down"}),
}
"""By `model_type`."""
PROJECTIONS = ("q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down")
"""All names of projections, in the order in which a layer runs them."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where in a model a LoRA-able layer stands; layers count from 0."""

    layer: int
    projection: str
    component: Component


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
    parameters = [name for name in _parameter_names(model) if _tail_of(name, experts) is not None]
    if experts and not parameters:
        raise OptionError("--modules: this model's experts are not stacked tensors; take attention")
    kinds = {isinstance(linear[name], Conv1D) for name in layers}
    if len(kinds) > 1:
        raise OptionError("--modules: layers that hold their weights in different orders cannot be changed together")
    return Targets(tuple(layers), tuple(parameters), kinds == {True})


def component_table(model: Any) -> dict[str, Place]:
    """Return where the LoRA-able layers of a model stand, by their paths without LoRA, in the model's order.

    Stacked experts stand under the path of their parameter. The head is none of them.

    Raises:
        OptionError: an architecture without a table; says which linear layers it has.
    """
    linear = linear_layers(model)
    parts = _parts(model, linear, "where layers stand: {} has no table; its linear layers are {}")
    kinds: tuple[tuple[Component, Mapping[str, str], Sequence[str]], ...] = (
        ("attention", parts.attention, list(linear)),
        ("mlp", parts.mlp, list(linear)),
        ("mlp", parts.experts, _parameter_names(model)),
    )
    found: dict[str, Place] = {}
    for component, tails, names in kinds:
        for name in names:
            tail, layer = _tail_of(name, tails), re.search(r"\.(\d+)\.", name)
            if tail is not None and layer is not None:
                found[name] = Place(int(layer[1]), tails[tail], component)
    order = {projection: place for place, projection in enumerate(PROJECTIONS)}
    return dict(sorted(found.items(), key=lambda item: (item[1].layer, order[item[1].projection])))


def linear_layers(model: Any) -> dict[str, nn.Module]:
    """Return a model's linear layers by their paths, without the head, under the names that they have without LoRA.

    Of one that also sees or hears, those of its text decoder.
    """
    head, decoder = model.get_output_embeddings(), _decoder(model)
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        inner = getattr(module, "base_layer", module)  # once LoRA is in place, it stands in the layer's stead
        linear = isinstance(inner, (nn.Linear, Conv1D)) and inner is not head
        if linear and ".lora_" not in path and path.startswith(decoder):
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
    parts = _parts(
        model, linear, f"--modules {modules}: the architecture {{}} is not known; name its linear layers: {{}}"
    )
    if modules == "attention":
        return list(parts.attention), ()
    return [*(() if modules == "mlp" else parts.attention), *parts.mlp], list(parts.experts)


def _parts(model: Any, linear: dict[str, nn.Module], unknown: str) -> Parts:
    kind = model.config.get_text_config().model_type
    parts = ARCHITECTURES.get(kind)
    if parts is None:
        raise OptionError(unknown.format(repr(kind), ", ".join(leaf_names(linear))))
    return parts


def _tail_of(name: str, tails: Iterable[str]) -> str | None:
    return next((tail for tail in tails if re.fullmatch(rf"(.*\.)?{tail}", name)), None)


def _parameter_names(model: nn.Module) -> list[str]:
    decoder = _decoder(model)
    names = [name for name, _ in model.named_parameters() if ".lora_" not in name and name.startswith(decoder)]
    return [name.replace(".base_layer", "") for name in names]


def _decoder(model: Any) -> str:
    """Return what paths within the text decoder begin with, where it is a part of the model beside others."""
    if model.config.get_text_config() is model.config:
        return ""
    decoder = model.get_decoder()
    return next((f"{path}." for path, module in model.named_modules() if path and module is decoder), "")
