"""Compare LoRA adapters of several ranks; those of one rank are seeds, and averaged."""

from __future__ import annotations

from qpeft.commands._study import StudyConfig, run_study
from qpeft.model_config import ModelConfig


def run(config: StudyConfig, model: ModelConfig) -> None:
    """Measure and write the folder."""
    from qpeft.analysis.study_designs import ranks

    run_study(config, model, config.adapter, ranks)
