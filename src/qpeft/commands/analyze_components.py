"""Compare attention and the MLP: LoRA adapters trained with one of them, and what either does of those with both.

Give adapters trained with --modules all, and, as far as there are any, with attention or mlp; they are told apart by
what they have, grouped by rank, and averaged over seeds.
"""

from __future__ import annotations

from qpeft.commands._study import StudyConfig, run_study
from qpeft.model_config import ModelConfig


def run(config: StudyConfig, model: ModelConfig) -> None:
    """Measure and write the folder."""
    from qpeft.analysis.study_designs import components

    run_study(config, model, config.adapter, components)
