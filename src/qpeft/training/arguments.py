"""What the Trainer is told: one device, and when to log, measure and save."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from transformers import TrainingArguments

from qpeft.training.config import TrainingConfig
from qpeft.training.processes import processes


@dataclass
class OneDevice(TrainingArguments):
    """Arguments of a Trainer that works where the frozen model is.

    By itself it would take the first device, and put a copy of the trained module on every one that it sees.
    """

    where: str = "cpu"
    """The frozen model's device."""

    @cached_property
    def _setup_devices(self) -> torch.device:
        _ = super()._setup_devices
        device = torch.device(self.where)
        self._n_gpu = min(self._n_gpu, 1)
        self.distributed_state.device = device  # where accelerate moves what is trained
        if device.type == "cuda":
            torch.cuda.set_device(device)  # checkpoints keep the random state of the current one
        return device


def trainer_arguments(
    config: TrainingConfig,
    rows: int,
    *,
    checkpoints: Path,
    device: torch.device,
    seed: int,
    measure: str | None,
    progress: bool,
) -> OneDevice:
    """Return the arguments for one pass over a data set that holds all epochs.

    Args:
        config: rates and sizes.
        rows: length of the data set.
        checkpoints: the Trainer's folder.
        device: the frozen model's.
        seed: of dropout.
        measure: what dev is judged by; None: there is no dev.
        progress: show a progress bar.
    """
    batches = math.ceil(math.ceil(rows / config.batch_queries) / processes().count)
    steps = math.ceil(batches / config.gradient_accumulation)
    every = max(1, math.ceil(steps / config.evaluations))
    return OneDevice(
        where=str(device),
        output_dir=str(checkpoints),
        per_device_train_batch_size=config.batch_queries,
        gradient_accumulation_steps=config.gradient_accumulation,
        num_train_epochs=1,  # the data set holds all epochs, so that its order does not depend on where one resumes
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.scheduler,
        warmup_steps=int(config.warmup * steps),
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        # What is logged is a mean since the last time, so a checkpoint must not fall between two.
        logging_steps=max(n for n in range(1, max(1, steps // 50) + 1) if every % n == 0),
        eval_strategy="no" if measure is None else "steps",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,
        load_best_model_at_end=measure is not None,
        metric_for_best_model=measure,
        greater_is_better=True,
        report_to=list(config.report_to) or "none",
        remove_unused_columns=False,
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
        use_cpu=device.type == "cpu",
        seed=seed,
        disable_tqdm=not progress,
        save_only_model=False,
        restore_callback_states_from_checkpoint=True,  # the patience that is left
    )
