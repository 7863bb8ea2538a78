"""What can be trained. One file each, with a frozen `Config` and `build(config, lm)`; the file name is its name.

The folder is the registry, as in `qpeft.methods`; other packages add theirs through the entry-point group
`qpeft.adapters`. An adapter may also have `Authors`, its `Config` with the defaults of the published code.
"""

from __future__ import annotations

from qpeft.registry import Registry

_registry = Registry("adapter", __name__, __path__)
available, load = _registry.available, _registry.load


def register_with_peft() -> None:
    """Let `peft.PeftConfig.from_pretrained` read adapter folders of the type QPEFT.

    Raises:
        MissingDependencyError: PEFT is not installed.
        ModelError: the installed version cannot be told of other types.
    """
    from qpeft.adapters._peft import register

    register()
