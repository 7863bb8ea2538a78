"""What stands between the matrix products of a layer, as `torch.compile` makes it: norms, and the activations of MLPs.

Done one by one, each of their operations reads and writes every state. Attention, and how layers follow each other,
stay as they are, so that caches, spared positions, ablations and cut models need to know nothing of this. Nor does
training: with gradients, and where an adapter changes the layers, everything is computed as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from qpeft.depth import find_layers
from qpeft.errors import OptionError

MLPS = ("mlp", "feed_forward", "intermediate")
"""What layers call their MLPs, or the part of one that ends in the activation. Those with experts are left alone."""


class Compiled:
    """Norms and MLPs of a model's layers, which compute as compiled while no gradients are taken.

    Args:
        model: whose norms and MLPs get another `forward`.

    Attributes:
        on: whether they do.

    Raises:
        ModelError: which modules the layers are cannot be told.
        OptionError: there is nothing to compile, or it does not compile here.
    """

    def __init__(self, model: Any) -> None:
        self.on = True
        layers = find_layers(model).modules
        found = [part for layer in layers for part in _parts(layer)]
        if not found:
            raise OptionError("--compile yes: in the layers of this model is nothing to compile")
        for part in found:
            part.forward = self._either(part.forward)
        try:
            for part in _parts(layers[0]):
                _try(part, model)
        except Exception as error:  # whatever a compiler raises that is not there, or fails
            raise OptionError(f"--compile yes: {type(error).__name__}: {str(error).strip().splitlines()[0]}") from error

    def _either(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        compiled = torch.compile(forward, dynamic=True)

        def chosen(*args: Any, **kwargs: Any) -> Any:
            one = forward if not self.on or torch.is_grad_enabled() else compiled
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


@torch.no_grad()
def _try(part: nn.Module, model: Any) -> None:
    weight = next(part.parameters())
    width = len(weight) if weight.ndim == 1 else model.config.get_text_config().hidden_size
    part(torch.zeros(2, 3, width, dtype=model.dtype, device=model.device))
