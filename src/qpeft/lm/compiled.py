"""What stands between the matrix products of a layer, as `torch.compile` makes it: norms, activations, rotations.

Done one by one, each of their operations reads and writes every state. Attention, and how layers follow each other,
stay as they are, so that caches, spared positions, ablations and cut models need to know nothing of this. Nor does
training: with gradients, and where an adapter changes the layers, everything is computed as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from qpeft.errors import OptionError
from qpeft.lm.depth import find_layers

MLPS = ("mlp", "feed_forward", "intermediate")
"""What layers call their MLPs, or the part of one that ends in the activation. Those with experts are left alone."""
ROTATION = "apply_rotary_pos_emb"
"""What transformers' modules call the function that rotates queries and keys; attention finds it by that name."""


class Compiled:
    """Norms, MLPs and rotations of a model's layers, which compute as compiled while no gradients are taken.

    Args:
        model: whose modules get another `forward`.

    Attributes:
        on: whether they compute as compiled.

    Raises:
        ModelError: which modules the layers are cannot be told.
        OptionError: there is nothing to compile, or it does not compile here.
    """

    def __init__(self, model: Any) -> None:
        self.on = True
        layers = find_layers(model).modules
        parts = [part for layer in layers for part in _parts(layer)]
        attentions = [module for layer in layers for module in layer.modules() if _rotates(module)]
        if not parts and not attentions:
            raise OptionError("--compile yes: in the layers of this model is nothing to compile")
        for part in parts:
            part.forward = self._either(part.forward, _compile(part.forward))
        rotations = {rotation: _compile(rotation) for rotation in map(_rotation, attentions)}
        for attention in attentions:
            rotating = _rotating(attention, rotations[_rotation(attention)])
            attention.forward = self._either(attention.forward, rotating)
        try:
            _try(model)
        except Exception as error:  # whatever a compiler raises that is not there, or fails
            raise OptionError(f"--compile yes: {type(error).__name__}: {str(error).strip().splitlines()[0]}") from error

    def _either(self, plain: Callable[..., Any], compiled: Callable[..., Any]) -> Callable[..., Any]:
        def chosen(*args: Any, **kwargs: Any) -> Any:
            one = plain if not self.on or torch.is_grad_enabled() else compiled
            return one(*args, **kwargs)

        return chosen

    @contextmanager
    def off(self) -> Iterator[None]:
        """Compute as without compiling, within this context."""
        before, self.on = self.on, False
        try:
            yield
        finally:
            self.on = before


def _parts(layer: nn.Module) -> Iterator[nn.Module]:
    """Yield what is compiled of a layer; torch's own norms are one pass already."""
    for module in layer.modules():
        if "Norm" in type(module).__name__ and not type(module).__module__.startswith("torch."):
            yield module
    for name, child in layer.named_children():
        if name in MLPS and not any("expert" in inner for inner, _ in child.named_modules()):
            yield child


def _rotates(module: nn.Module) -> bool:
    """Whether it is attention whose own forward calls a rotation; one that something else wraps is left alone."""
    code = getattr(getattr(module.forward, "__func__", None), "__code__", None)
    return code is not None and ROTATION in code.co_names


def _rotation(attention: Any) -> Any:
    """Return the function that an attention rotates with."""
    return attention.forward.__func__.__globals__[ROTATION]


def _rotating(attention: Any, rotation: Any) -> Any:
    """Return an attention's forward as it is, but for the rotation; what its module calls by that name stays."""
    own = attention.forward.__func__
    names = {**own.__globals__, ROTATION: rotation}
    other = FunctionType(own.__code__, names, own.__name__, own.__defaults__, own.__closure__)
    other.__kwdefaults__ = own.__kwdefaults__
    return MethodType(other, attention)


def _compile(function: Any) -> Any:
    return torch.compile(function, dynamic=True)


@torch.no_grad()
def _try(model: Any) -> None:
    model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=model.device), use_cache=False)
