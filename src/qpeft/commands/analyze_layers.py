"""Silence layers of a LoRA adapter, and measure what is left.

Without one layer, one layer alone, windows of neighbouring layers both ways, the lowest and the highest ones. Several
adapters are seeds of one: what they say is averaged. States below the first layer that differs are computed once.
"""

from __future__ import annotations

from dataclasses import dataclass

from qpeft.commands._study import StudyConfig, run_study
from qpeft.model_config import ModelConfig


@dataclass(frozen=True)
class Config(StudyConfig):
    """Study of layers."""

    window: int = 4
    """Neighbouring layers that are silenced, or left, together."""


def run(config: Config, model: ModelConfig) -> None:
    """Measure and write the folder."""
    from qpeft.analysis.study_designs import layers

    run_study(config, model, config.adapter, lambda subjects: layers(subjects, config.window))
