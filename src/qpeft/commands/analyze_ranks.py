"""Compare LoRA adapters of several ranks; those of one rank are seeds, and averaged."""

from __future__ import annotations

from dataclasses import dataclass

from qpeft.commands._study import StudyConfig, run_study
from qpeft.model_config import ModelConfig


@dataclass(frozen=True)
class Config(StudyConfig):
    """Study of ranks."""


def run(config: Config, model: ModelConfig) -> None:
    """Measure and write the folder."""
    from qpeft.analysis.study_designs import ranks

    run_study(config, model, config.adapter, ranks)
