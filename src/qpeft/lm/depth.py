"""A decoder cut to its first layers, followed by its own last norm and head, and whole again afterwards.

What a model says after fewer layers is a rough guess at what it says after all (logit lens), at a fraction of the work.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from qpeft.errors import ModelError


@dataclass(frozen=True)
class Layers:
    """A stack's list of layers, the module that holds it, and its name there."""

    parent: nn.Module
    name: str
    modules: nn.ModuleList

    @contextmanager
    def first(self, depth: int) -> Iterator[None]:
        """Let the model run its first `depth` layers only, within this context.

        Nothing of the model is moved or changed: its list of layers is replaced by one that stops earlier, and put back
        however the context ends. One context at a time, and not from two threads at once.
        """
        with self._run(list(self.modules)[:depth]):
            yield

    @contextmanager
    def ending_in(self, last: Any) -> Iterator[None]:
        """Let the model call `last` in the place of its last layer, within this context; see `first`."""
        with self._run([*list(self.modules)[:-1], last]):
            yield

    @contextmanager
    def _run(self, called: Sequence[Any]) -> Iterator[None]:
        setattr(self.parent, self.name, _Called(self.modules, called))
        try:
            yield
        finally:
            setattr(self.parent, self.name, self.modules)


def find_layers(model: Any) -> Layers:
    """Return a stack's layers.

    They are the one list, not within another such, that has as many modules as the configuration says layers.

    Raises:
        ModelError: there is none, or there are several.
    """
    count = model.config.get_text_config().num_hidden_layers
    found: dict[str, Layers] = {}
    for path, parent in model.named_modules():
        for name, child in parent.named_children():
            inner = any(path == other or path.startswith(f"{other}.") for other in found)
            if isinstance(child, nn.ModuleList) and len(child) == count and not inner:
                found[f"{path}.{name}".lstrip(".")] = Layers(parent, name, child)
    if len(found) != 1:
        kind = model.config.model_type
        raise ModelError(f"the architecture {kind!r} has {len(found) or 'no'} lists of {count} layers, not one")
    return next(iter(found.values()))


class _Called(nn.ModuleList):
    """Gives what is to be called as its modules, though all layers are registered.

    transformers installs hooks when states are first asked for; it must find all layers then, or the states of those
    that it did not find would be missing ever after.
    """

    def __init__(self, layers: nn.ModuleList, called: Sequence[Any]) -> None:
        super().__init__()
        self._modules.update(layers._modules)
        self._called = called

    def __len__(self) -> int:
        return len(self._called)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._called)

    def __getitem__(self, index: Any) -> Any:
        return self._called[index]
