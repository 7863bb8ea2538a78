"""What can be trained. One file each, with a frozen `Config` and `build(config, lm)`; the file name is its name.

The folder is the registry, as in `qpeft.methods`; other packages add theirs through the entry-point group
`qpeft.adapters`, a process by `register`. A module may also have:

* `Authors`: its `Config` with the defaults of the published code, for `--preset authors`.
* `CHANGES_LM` (bool): its adapters change the model's layers, so that training keeps no encoded passages.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qpeft.registry import Registry

if TYPE_CHECKING:
    from qpeft.adapter import Adapter
    from qpeft.lm.causal import CausalLM

_registry = Registry("adapter", __name__, __path__)
available, load, register = _registry.available, _registry.load, _registry.register


def build(name: str, config: Any, lm: CausalLM) -> Adapter:
    """Return an untrained adapter of a name for a model; `config` is kept as its `config`.

    Raises:
        OptionError: there is no adapter of this name, or it cannot be made with these options.
    """
    adapter: Adapter = load(name).build(config, lm)
    adapter.config = config
    return adapter


def register_with_peft() -> None:
    """Let `peft.PeftConfig.from_pretrained` read adapter folders of the type QPEFT.

    Raises:
        MissingDependencyError: PEFT is not installed.
        ModelError: the installed version cannot be told of other types.
    """
    from qpeft.adapters._peft import register

    register()
