"""Whether two ways of computing the same agree: what saves work is tried on a model before it is relied on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LEAST = 1e-4
"""Part of the values' size by which two ways may differ in float32."""
ROUNDINGS = 16
"""Roundings of a number that may add up, in types where these are more than that."""
EIGHT_BITS = 2**-7
"""Least rounding of a model whose weights have 8 bits: states are rounded to as many before each product."""


def agree(one: Tensor, other: Tensor, model: Any) -> bool:
    """Whether a model's logits or states of one shape differ by no more than roundings do, by their Euclidean norm.

    They are taken from their mean over the last dimension: what all logits have in common says nothing of words, and
    may be far above what tells them apart. A single rounding of the values as they are is no difference.
    """
    eps = max(torch.finfo(one.dtype).eps, EIGHT_BITS if getattr(model, "is_loaded_in_8bit", False) else 0.0)
    kind = torch.float64 if one.device.type == "cpu" else torch.float32
    exact, tried = one.to(kind), other.to(kind)
    centred = exact - exact.mean(-1, keepdim=True)
    difference = centred - (tried - tried.mean(-1, keepdim=True))
    return bool(difference.norm() <= max(LEAST, ROUNDINGS * eps) * centred.norm() + eps * exact.norm())
