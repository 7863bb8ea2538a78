"""Ways to rank. One file each, with a frozen `Config` and `build(config, lm) -> Reranker`; the file name is its name.

The folder is the registry. Other packages add theirs through the entry-point group `qpeft.methods`, whose entries are
modules with the same two names.
"""

from __future__ import annotations

from qpeft.registry import Registry

_registry = Registry("method", __name__, __path__)
available, load = _registry.available, _registry.load
