"""LoRA: low-rank additions to linear layers (Hu et al. 2022, arXiv 2106.09685).

    W x + (alpha / r) · B A x        A `[r, in]` random, B `[out, r]` zero at the start

The layers are peft's. They stand inside the frozen model, switched off, so that scores without the adapter stay those
of the model; `applied` switches one adapter's on. What was encoded without them is of no use, so rows go through the
model whole: training and scoring cost more than with a prompt adapter.

With `hint`, a prompt adapter is trained together with them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qpeft.options import Checked

if TYPE_CHECKING:
    from qpeft.adapter import Adapter
    from qpeft.lm.causal import CausalLM

CHANGES_LM = True
"""Encoded contexts are of no use here; said in the module, so that a model can be opened accordingly."""


@dataclass(frozen=True)
class Config(Checked):
    """Options of LoRA."""

    r: int = 8
    """Rank of the additions."""
    alpha_per_rank: float = 2.0
    """alpha / r, their scale; constant, so that ranks can be compared at one learning rate."""
    alpha: float | None = None
    """alpha itself, whatever the rank; by default alpha_per_rank times r."""
    dropout: float = 0.0
    """On the input of the additions, in training."""
    modules: str = "all"
    """What is changed: all, attention, mlp, or names of linear layers with commas."""
    layers: str = ""
    """In which of the model's layers, from 0: ranges and numbers with commas, as in 5-15,20; by default in all."""
    hint: str = ""
    """Name of a prompt adapter that is trained too, with its default options; by default none."""


def build(config: Config, lm: CausalLM) -> Adapter:
    """Return an untrained adapter; its layers are put into the model, switched off.

    Raises:
        OptionError: options out of range, an architecture without a table, or a hint that cannot be combined.
        MissingDependencyError: peft is not installed.
    """
    from qpeft.adapters._lora import LoraAdapter  # torch, only when there is work

    return LoraAdapter(config, lm)
