"""Ways to rank. One file each, with a frozen `Config` and `build(config, lm) -> Reranker`; the file name is its name.

The folder is the registry. Other packages add theirs through the entry-point group `qpeft.methods`, whose entries are
modules with the same two names.
"""

from __future__ import annotations

import importlib
import pkgutil
from importlib.metadata import entry_points
from types import ModuleType

from qpeft.errors import OptionError, nearest


def available() -> list[str]:
    """Return the names of all methods."""
    own = {module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")}
    return sorted(own | {entry.name for entry in entry_points(group="qpeft.methods")})


def load(name: str) -> ModuleType:
    """Return the module of a method.

    Raises:
        OptionError: no method has this name.
    """
    name = name.replace("-", "_")
    if name not in available():
        raise OptionError(f"unknown method {name!r}{nearest(name, available())}")
    for entry in entry_points(group="qpeft.methods"):
        if entry.name == name:
            module: ModuleType = entry.load()
            return module
    return importlib.import_module(f"{__name__}.{name}")
