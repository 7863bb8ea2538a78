"""Compare LoRA adapters trained with several losses on the same data; those of one loss are seeds, and averaged.

They are compared with the loss of the adapter that is given first.
"""

from __future__ import annotations

from qpeft.commands._study import StudyConfig, run_study
from qpeft.model_config import ModelConfig


def run(config: StudyConfig, model: ModelConfig) -> None:
    """Measure and write the folder."""
    from qpeft.analysis.study_designs import losses

    run_study(config, model, config.adapter, losses)
