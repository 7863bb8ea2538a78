"""Ways to rank. One file each, with a frozen `Config` and `build(config, lm) -> Reranker`; the file name is its name.

The folder is the registry. Other packages add theirs through the entry-point group `qpeft.methods`, whose entries are
modules with the same two names; a process by `register`. Methods that score rows also have
`build_scorer(config, lm, opened=None, *, kept=None)`, which returns a `RowScorer`: training, the server and the
analyses need the scorer alone. What can be trained has besides:

* `SCORES` ("log_likelihood", "log_odds" or "answers"): what its scores are, which decides which losses there are.
* `TEMPLATE` (str): the template that it is trained with, unless another is asked for.
* `HEAD` (bool): a head on the last token is trained too.
* `Trained`: a frozen dataclass of options that belong to the adapter and are kept with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qpeft.registry import Registry

if TYPE_CHECKING:
    from pathlib import Path

    from qpeft.adapters._folder import AdapterFolder
    from qpeft.lm.pretrained import PretrainedLM
    from qpeft.methods._rows import RowScorer

_registry = Registry("method", __name__, __path__)
available, load, register = _registry.available, _registry.load, _registry.register


def chosen(asked: str | None, adapter: str | Path | None) -> str:
    """Return the name of the method that is to be used.

    Args:
        asked: the one asked for, if any; else it is what the adapter was trained for, else query likelihood.
        adapter: its folder, or the name of an embedded one; none if None.

    Raises:
        AdapterError: the adapter decides, and its folder cannot be read.
    """
    if asked is not None or adapter is None:
        return asked or "query_likelihood"
    from qpeft.adapters._folder import method_of

    return method_of(adapter)


def open_scorer(lm: PretrainedLM, adapter: AdapterFolder | str | Path, **options: Any) -> RowScorer:
    """Return the scorer of a trained adapter, by the method that it was trained with.

    Args:
        lm: the language model.
        adapter: its folder, the name of an embedded one, or an opened one.
        options: fields of the method's `Config`.

    Raises:
        AdapterError: the adapter cannot be opened, or was made for another model.
        OptionError: options that contradict each other.
    """
    from qpeft.adapters._folder import open_adapter

    opened = open_adapter(adapter, lm, None)
    module = load(opened.method)
    scorer: RowScorer = module.build_scorer(module.Config(**options), lm, opened)
    return scorer
