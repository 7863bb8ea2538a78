"""Whether two ways of computing the same agree: what saves work is tried on a model before it is relied on."""

from __future__ import annotations

import torch
from torch import Tensor

LEAST = 1e-4
"""Part of the values' size by which two ways may differ in float32."""
ROUNDINGS = 16
"""Roundings of a number that may add up, in types where these are more than that."""


def agree(one: Tensor, other: Tensor) -> bool:
    """Whether logits or states of one shape differ by no more than roundings do, measured by their Euclidean norm.

    They are taken from their mean over the last dimension: what all logits have in common says nothing of words, and
    may be far above what tells them apart. A single rounding of the values as they are is no difference.
    """
    eps = torch.finfo(one.dtype).eps
    kind = torch.float64 if one.device.type == "cpu" else torch.float32
    exact, tried = one.to(kind), other.to(kind)
    centred = exact - exact.mean(-1, keepdim=True)
    difference = centred - (tried - tried.mean(-1, keepdim=True))
    return bool(difference.norm() <= max(LEAST, ROUNDINGS * eps) * centred.norm() + eps * exact.norm())
