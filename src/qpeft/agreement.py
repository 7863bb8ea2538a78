"""Whether two ways of computing the same agree: what saves work is tried on a model before it is relied on."""

from __future__ import annotations

import torch
from torch import Tensor

LEAST = 1e-4
"""Part of the values' size by which two ways may differ in float32."""
ROUNDINGS = 16
"""Roundings of a number that may add up, in types where these are more than that."""


def agree(one: Tensor, other: Tensor) -> bool:
    """Whether values of one shape differ by no more than roundings do, measured by their Euclidean norm."""
    allowed = max(LEAST, ROUNDINGS * torch.finfo(one.dtype).eps)
    exact = one.double() if one.device.type == "cpu" else one.float()
    return bool((exact - other.to(exact.dtype)).norm() <= allowed * exact.norm())
