"""What can be trained. One file each, with a frozen `Config` and `build(config, lm)`; the file name is its name.

The folder is the registry, as in `qpeft.methods`; other packages add theirs through the entry-point group
`qpeft.adapters`. An adapter may also have `Authors`, its `Config` with the defaults of the published code.
"""

from __future__ import annotations

import importlib
import pkgutil
from importlib.metadata import entry_points
from types import ModuleType

from qpeft.errors import OptionError, nearest


def available() -> list[str]:
    """Return the names of all adapters."""
    own = {module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")}
    return sorted(own | {entry.name for entry in entry_points(group="qpeft.adapters")})


def load(name: str) -> ModuleType:
    """Return the module of an adapter.

    Raises:
        OptionError: no adapter has this name.
    """
    name = name.replace("-", "_")
    if name not in available():
        raise OptionError(f"unknown adapter {name!r}{nearest(name, available())}")
    for entry in entry_points(group="qpeft.adapters"):
        if entry.name == name:
            module: ModuleType = entry.load()
            return module
    return importlib.import_module(f"{__name__}.{name}")


def register_with_peft() -> None:
    """Let `peft.PeftConfig.from_pretrained` read adapter folders of the type QPEFT.

    Raises:
        MissingDependencyError: PEFT is not installed.
        ModelError: the installed version cannot be told of other types.
    """
    from qpeft.adapters._peft import register

    register()
