"""Follow LoRA adapters over the steps of their training.

--adapter is a folder of step folders (step-000000, step-000050, …), each an adapter; several such folders are seeds of
one training, and averaged.
"""

from __future__ import annotations

from pathlib import Path

from qpeft.commands._study import StudyConfig, run_study
from qpeft.errors import InputError
from qpeft.model_config import ModelConfig


def run(config: StudyConfig, model: ModelConfig) -> None:
    """Measure and write the folder."""
    from qpeft.analysis.study_designs import checkpoints

    run_study(config, model, [step for folder in config.adapter for step in _steps(Path(folder))], checkpoints)


def _steps(folder: Path) -> list[str]:
    found = sorted(path for path in folder.glob("step-*") if path.is_dir())
    if not found:
        raise InputError(f"{folder}: no folders of steps (step-000000, …)")
    return [str(path) for path in found]
