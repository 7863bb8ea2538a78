"""Silence projections of a LoRA adapter (q, k, v, o, gate, up, down), and measure what is left.

Each in all layers, and with --grid also in each layer. Several adapters are seeds of one: what they say is averaged.
"""

from __future__ import annotations

from dataclasses import dataclass

from qpeft.commands._study import StudyConfig, run_study
from qpeft.model_config import ModelConfig


@dataclass(frozen=True)
class Config(StudyConfig):
    """Study of projections."""

    grid: bool = False
    """Also each projection of each layer, as a heat map: layers × projections × 2 more ablations."""


def run(config: Config, model: ModelConfig) -> None:
    """Measure and write the folder."""
    from qpeft.analysis.study_designs import projections

    run_study(config, model, config.adapter, lambda subjects: projections(subjects, config.grid))
