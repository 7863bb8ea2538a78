"""The layers behind lora.py."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from qpeft import adapters
from qpeft.adapter import Adapter, Hints, Pairs
from qpeft.adapters import lora
from qpeft.adapters._lora_targets import Place, Targets, component_table, resolve
from qpeft.adapters.lora import CHANGES_LM, Config
from qpeft.errors import AdapterError, MissingDependencyError, OptionError, at_least
from qpeft.lm.causal import CausalLM
from qpeft.lm.read_out import WEIGHT, Head

HEAD = WEIGHT.partition(".")[0]
_LABELS = itertools.count()
"""A label is not used again, whatever was withdrawn."""


class LoraAdapter(Adapter):
    """The additions, and the prompt adapter that goes with them.

    Tensors are named as in a PEFT folder without its first `base_model.`: `model.PATH.lora_A.weight`,
    `model.score.weight` of a head, and `qpeft.…` for those of the prompt adapter.

    Args:
        config: options.
        lm: the model that gets the layers.
        settings: peft's configuration, where it is not to be made from the options.
    """

    changes_lm = CHANGES_LM

    def __init__(self, config: Config, lm: CausalLM, settings: Any = None) -> None:
        super().__init__()
        self.config = config
        _check(config)
        self._width = lm.embeddings.weight.shape[1]
        self.qpeft = _hint(config.hint, lm)
        self.reads_template = self.qpeft is not None and self.qpeft.reads_template
        self.peft_config = settings or _settings(config, lm)
        # In every forward pass, peft takes apart what holds experts.
        self.side_by_side = not getattr(self.peft_config, "target_parameters", None)
        self.label, self._layers = _insert(self.peft_config, lm)
        self._peft_configs = lm.model.peft_config
        self._frozen = (lm.model,)  # in a tuple, so that it is not taken for a part of this module
        self.model = nn.Module()
        for path, layer in self._layers.items():
            own = _descend(self.model, path)
            for name in ("lora_A", "lora_B", "lora_dropout"):
                own.add_module(name, getattr(layer, name)[self.label])
        self.model.float()
        self._switch([])
        self.eval()

    @property
    def head(self) -> Head | None:
        """What was trained on the state of the last token, `[d] → [1]`."""
        found = self.model._modules.get(HEAD)
        return None if found is None else Head(found)

    def add_head(self, lm: CausalLM) -> None:
        """Let a head on the last token be trained too; it starts as the model's own, or as in transformers."""
        settings = lm.model.config.get_text_config()
        module = nn.Linear(lm.width(-1), 1, bias=False, device=lm.device)
        with torch.no_grad():
            if lm.head is None:
                module.weight.normal_(std=getattr(settings, "initializer_range", 0.02))
            else:
                module.weight.copy_(next(lm.head.module.parameters()))
        self.model.add_module(HEAD, module)

    def hint_length(self, query_tokens: int) -> int:
        """Return the prompt adapter's, or 0."""
        return 0 if self.qpeft is None else self.qpeft.hint_length(query_tokens)

    def forward(self, pairs: Pairs) -> Hints:
        """Return the prompt adapter's hints, or empty ones."""
        if self.qpeft is not None:
            hints: Hints = self.qpeft(pairs)
            return hints
        nothing = torch.zeros(len(pairs.query), 0, self._width, device=pairs.query.device)
        return Hints(nothing, nothing.new_zeros(nothing.shape[:2], dtype=torch.bool))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Change the model within this context; one adapter at a time, and not from two threads at once.

        Raises:
            AdapterError: it was withdrawn.
        """
        if self.label not in self._peft_configs:
            raise AdapterError("this LoRA adapter was taken out of the model (withdraw): open it again")
        self._switch([self.label])
        try:
            yield
        finally:
            self._switch([])

    def places(self) -> dict[Place, int]:
        """Return where this adapter's additions stand, each with its number of parameters, in the model's order.

        Raises:
            OptionError: the architecture has no table, or the table does not say what one of the layers does.
        """
        counts = {
            place: sum(half[self.label].weight.numel() for half in (layer.lora_A, layer.lora_B))
            for place, layer in self._placed
        }
        return {place: counts[place] for place in component_table(self._frozen[0]).values() if place in counts}

    def scales(self) -> dict[Place, float]:
        """Return what the product of each addition's matrices is multiplied with, alpha / r; places as `places`."""
        found = {place: float(layer.scaling[self.label]) for place, layer in self._placed}
        return {place: found[place] for place in self.places()}

    @contextmanager
    def only(self, active: Collection[Place]) -> Iterator[None]:
        """Let only the additions at these places act, within this context; the others are scaled to zero.

        What else the adapter has (a head, a hint) acts as before. Contexts may stand in one another: then an addition
        acts that all of them let act. No weight is copied or changed.

        Raises:
            OptionError: as `places`; or the adapter has no addition at one of the places.
        """
        placed = self._placed
        unknown = set(active) - {place for place, _ in placed}
        if unknown:
            raise OptionError(f"this adapter has no addition at {min(unknown, key=str)}")
        silenced = [layer for place, layer in placed if place not in active]
        before = [layer.scaling[self.label] for layer in silenced]
        try:
            for layer in silenced:
                layer.scaling[self.label] = 0.0
            yield
        finally:
            for layer, scaling in zip(silenced, before, strict=True):
                layer.scaling[self.label] = scaling

    def withdraw(self) -> None:
        """Take the additions out of the model."""
        if self._peft_configs.pop(self.label, None) is not None:
            for layer in self._layers.values():
                layer.delete_adapter(self.label)

    def merge(self, lm: CausalLM) -> None:
        """Add the matrices to the model's weights for good; neither this adapter nor any other is there afterwards."""
        from peft.tuners.lora import LoraLayer

        for layer in self._layers.values():
            layer.merge(safe_merge=True, adapter_names=[self.label])
        modules = dict(lm.model.named_modules())
        for path, module in modules.items():
            parent, _, name = path.rpartition(".")
            if isinstance(module, LoraLayer) and not isinstance(modules[parent], LoraLayer):
                setattr(modules[parent], name, module.get_base_layer())

    def peft_facts(self) -> dict[str, Any]:
        """Return what PEFT keeps in `adapter_config.json`."""
        facts = {key: sorted(v) if isinstance(v, set) else v for key, v in self.peft_config.to_dict().items()}
        facts["inference_mode"] = True
        if self.head is not None:
            facts |= {"task_type": "SEQ_CLS", "modules_to_save": ["classifier", HEAD]}
        return facts

    @functools.cached_property
    def _placed(self) -> list[tuple[Place, Any]]:
        table = component_table(self._frozen[0])
        found = []
        for path, layer in self._layers.items():
            names = [path.replace(".base_layer", ""), getattr(layer, "parameter_name", "")]
            name = ".".join(filter(None, names))
            if name not in table:
                raise OptionError(f"the additions to {name} are none of attention's or the MLP's")
            found.append((table[name], layer))
        return found

    def _switch(self, labels: list[str]) -> None:
        # peft couples "active" with "trainable", for all adapters of a layer; what is trainable is not to change here.
        trainable = [(p, p.requires_grad) for layer in self._layers.values() for p in layer.parameters()]
        for layer in self._layers.values():
            layer.set_adapter(labels)
        for parameter, flag in trainable:
            parameter.requires_grad_(flag)


def _check(config: Config) -> None:
    at_least(1, r=config.r)
    if config.alpha_per_rank <= 0:
        raise OptionError(f"--alpha-per-rank is {config.alpha_per_rank}; it must be above 0")
    if config.alpha is not None and config.alpha <= 0:
        raise OptionError(f"--alpha is {config.alpha}; it must be above 0")
    if not 0 <= config.dropout < 1:
        raise OptionError(f"--dropout is {config.dropout}; it must be from 0 to below 1")


def _hint(name: str, lm: CausalLM) -> Adapter | None:
    if not name:
        return None
    module = adapters.load(name)
    if module is lora:
        raise OptionError("--hint lora: the hint is a prompt adapter")
    hint = adapters.build(name, module.Config(), lm)
    if hint.reads_layer is not None or hint.changes_lm:
        raise OptionError(f"--hint {name}: it reads the model's own states of the passage, which LoRA changes")
    return hint


def _within(text: str, targets: Targets, lm: CausalLM) -> Targets:
    """Return the targets in the layers that an option names: the first number of a path is that of its layer."""
    if not text.strip():
        return targets
    count = lm.model.config.get_text_config().num_hidden_layers
    wanted: set[int] = set()
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, -1)
        if not first <= last < count:
            raise OptionError(f"--layers {text}: {part.strip()!r} is no range of the model's layers, 0-{count - 1}")
        wanted |= set(range(first, last + 1))

    def inside(paths: tuple[str, ...]) -> tuple[str, ...]:
        numbers = ((path, re.search(r"\.(\d+)\.", path)) for path in paths)
        return tuple(path for path, number in numbers if number and int(number[1]) in wanted)

    return dataclasses.replace(targets, layers=inside(targets.layers), parameters=inside(targets.parameters))


def _settings(config: Config, lm: CausalLM) -> Any:
    """Return peft's configuration of the options."""
    targets = _within(config.layers, resolve(config.modules, lm.model), lm)
    if targets.parameters and config.dropout:
        raise OptionError("--dropout must be 0 where experts are changed; or take --modules attention")
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise MissingDependencyError("peft", "lora") from error
    alpha = config.alpha_per_rank * config.r if config.alpha is None else config.alpha
    return LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=lm.name,
        revision=lm.revision,
        r=config.r,
        lora_alpha=int(alpha) if alpha == int(alpha) else alpha,  # type: ignore[arg-type]
        lora_dropout=config.dropout,
        target_modules=list(targets.layers),
        target_parameters=list(targets.parameters) or None,
        fan_in_fan_out=targets.transposed,
    )


def _insert(settings: Any, lm: CausalLM) -> tuple[str, dict[str, Any]]:
    """Put new layers into the model; return the adapter's name there, and the layers by path."""
    from peft.tuners.lora import LoraLayer, LoraModel

    label = f"qpeft{next(_LABELS)}"
    with warnings.catch_warnings():
        # Several adapters in one model are what is wanted.
        warnings.filterwarnings("ignore", "Already found a `peft_config`")
        try:
            LoraModel(lm.model, settings, label)
        except ValueError as error:
            raise OptionError(f"LoRA cannot be put into {lm.name!r}: {' '.join(str(error).split())}") from error
    paths = lm.model.named_modules()
    layers: dict[str, Any] = {path: m for path, m in paths if isinstance(m, LoraLayer) and label in m.lora_A}
    for layer in layers.values():
        if label not in layer.lora_variant:
            # peft would turn every layer's input and output into float32 and back.
            layer.cast_input_dtype_enabled = False
        for halves in (layer.lora_A, layer.lora_B):
            halves[label] = _Half(halves[label])
    return label, layers


class _Half(nn.Linear):
    """One of an addition's two matrices: kept in float32, multiplied in bfloat16 where its input is.

    Not in float16, whose range is too narrow for small gradients.
    """

    def __init__(self, made: nn.Linear) -> None:
        super().__init__(made.in_features, made.out_features, made.bias is not None, device="meta")
        self.weight, self.bias = made.weight, made.bias

    def forward(self, input: Tensor) -> Tensor:
        kind = torch.bfloat16 if input.dtype is torch.bfloat16 else self.weight.dtype
        bias = None if self.bias is None else self.bias.to(kind)
        return functional.linear(input.to(kind), self.weight.to(kind), bias)


def _descend(root: nn.Module, path: str) -> nn.Module:
    """Return the module at a path, made where it is missing."""
    for part in path.split("."):
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    return root
