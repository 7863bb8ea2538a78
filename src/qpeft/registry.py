"""Folders of plug-ins: a file's name is its name on the command line, and other packages add theirs by entry points."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType

from qpeft.errors import OptionError, nearest


@dataclass(frozen=True)
class Registry:
    """A package whose modules are plug-ins, apart from those whose names begin with `_`.

    Args:
        kind: what one of them is called in messages.
        package: name of the package; also the entry-point group of other packages' modules.
        path: its folders (`__path__`).
    """

    kind: str
    package: str
    path: Iterable[str]

    def available(self) -> list[str]:
        """Return the names of all plug-ins."""
        own = {module.name for module in pkgutil.iter_modules(self.path) if not module.name.startswith("_")}
        return sorted(own | self._added().keys())

    def load(self, name: str) -> ModuleType:
        """Return the module of a plug-in.

        Raises:
            OptionError: none has this name.
        """
        name = name.replace("-", "_")
        if (added := self._added().get(name)) is not None:
            module: ModuleType = added.load()
            return module
        if name not in self.available():
            raise OptionError(f"unknown {self.kind} {name!r}{nearest(name, self.available())}")
        return importlib.import_module(f"{self.package}.{name}")

    def _added(self) -> dict[str, EntryPoint]:
        """Return what other packages add, under names as they are spelt here."""
        return {entry.name.replace("-", "_"): entry for entry in entry_points(group=self.package)}
