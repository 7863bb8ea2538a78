"""Folders of plug-ins: a file's name is its name on the command line, and other packages add theirs by entry points."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from qpeft.errors import OptionError, nearest


@dataclass(frozen=True)
class Registry:
    """A package whose modules are plug-ins, apart from those whose names begin with `_`.

    Args:
        kind: what one of them is called in messages.
        package: name of the package; also the entry-point group of other packages' modules.
        path: its folders (`__path__`).
        registered: by name, what `register` has added in this process.
    """

    kind: str
    package: str
    path: Iterable[str]
    registered: dict[str, Any] = field(default_factory=dict)

    def available(self) -> list[str]:
        """Return the names of all plug-ins."""
        return sorted(self._own() | self._added().keys() | self.registered.keys())

    def register(self, name: str, plugin: Any) -> None:
        """Let this process know a plug-in of its own: a module, or in a notebook a class, with `Config` and `build`.

        Raises:
            OptionError: it lacks one of them, or the name is taken by one of qpeft's.
        """
        name = name.replace("-", "_")
        if name in self._own():
            raise OptionError(f"{self.kind} {name!r} is one of qpeft's; take another name")
        self.registered[name] = self._checked(name, plugin)

    def load(self, name: str) -> Any:
        """Return a plug-in: a module with `Config` and `build`. A name of qpeft's own means qpeft's own.

        Raises:
            OptionError: none has this name; or another package's cannot be imported, or lacks what it must have.
        """
        name = name.replace("-", "_")
        if name in self._own():
            return importlib.import_module(f"{self.package}.{name}")
        if name in self.registered:
            return self.registered[name]
        if (added := self._added().get(name)) is None:
            raise OptionError(f"unknown {self.kind} {name!r}{nearest(name, self.available())}")
        try:
            return self._checked(name, added.load())
        except (ImportError, AttributeError) as error:
            raise OptionError(f"{self.kind} {name!r}: {added.value} cannot be imported: {error}") from error

    def _checked(self, name: str, plugin: Any) -> Any:
        for part in ("Config", "build"):
            if not callable(getattr(plugin, part, None)):
                raise OptionError(f"{self.kind} {name!r}: {getattr(plugin, '__name__', plugin)} has no {part!r}")
        return plugin

    def _own(self) -> set[str]:
        return {module.name for module in pkgutil.iter_modules(self.path) if not module.name.startswith("_")}

    def _added(self) -> dict[str, EntryPoint]:
        """Return what other packages add, under names as they are spelt here."""
        return {entry.name.replace("-", "_"): entry for entry in entry_points(group=self.package)}
