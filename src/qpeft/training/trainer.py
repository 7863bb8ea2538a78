"""Training of adapters on groups of passages, with `transformers.Trainer` underneath.

From the Trainer come checkpoints, resume, schedules, accumulation, clipping, early stopping and logging. Ours are the
rows, the losses, the frozen model beside the trained one, and the measure: dev is *ranked*. A process takes one device,
the frozen model's; several may train together (`processes`).

A step's rows are a function of the seed and the number of the step alone, and encoded contexts do not depend on when
they were encoded; so a run that was killed and resumed equals an uninterrupted one, to the bit on a CPU.

Shapes: `B` queries of a batch, `G` passages of each, `N` = B · G rows.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback

from qpeft import losses
from qpeft.adapter import Adapter
from qpeft.errors import OptionError, ScoreError, StateError
from qpeft.methods._rows import RowScorer
from qpeft.template import Row
from qpeft.training.arguments import trainer_arguments
from qpeft.training.checkpointing import checkpointed, room_on
from qpeft.training.config import TrainingConfig
from qpeft.training.contexts import EncodeAhead
from qpeft.training.dev import DevRanking
from qpeft.training.groups import draw, in_batch_negatives, of_other_queries
from qpeft.training.keep_steps import KeepSteps
from qpeft.training.processes import together
from qpeft.types import Group

WEIGHTS = "adapter.safetensors"


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of a step, query by query; `mask` `[B, G]` says which places of the rectangle have a row."""

    rows: list[Row]
    mask: Tensor
    teacher: Tensor | None


class TrainingSet(Dataset[tuple[int, Group]]):
    """The groups of all epochs, one after the other, each epoch in an order of its own: item → (epoch, group)."""

    def __init__(self, groups: Sequence[Group], epochs: int, seed: int) -> None:
        self.groups = groups
        self.epochs = epochs
        self._seed = seed
        self._order: tuple[int, list[int]] = (-1, [])

    def __len__(self) -> int:
        return len(self.groups) * self.epochs

    def __getitem__(self, index: int) -> tuple[int, Group]:
        epoch, place = divmod(index, len(self.groups))
        if self._order[0] != epoch:
            order = list(range(len(self.groups)))
            random.Random(f"{self._seed}-{epoch}").shuffle(order)
            self._order = epoch, order
        return epoch, self.groups[self._order[1][place]]


class Collator:
    """Draws each group's negatives for its epoch, and turns pairs into rows.

    Args:
        scorer: makes the rows.
        config: how many negatives, and whether other queries' positives join them.
        seed: of the draw.
        teacher: scores by (query id, passage id), for distillation; a pair that has none gets the lowest of all.

    Raises:
        OptionError: the loss learns from a teacher, and there is none.
    """

    def __init__(
        self,
        scorer: RowScorer,
        config: TrainingConfig,
        seed: int,
        teacher: Mapping[tuple[str, str], float] | None = None,
    ) -> None:
        self._scorer, self._config, self._seed = scorer, config, seed
        losses.check_loss(config.loss, teacher=teacher is not None)
        self._teacher = teacher
        self._lowest = min(teacher.values(), default=0.0) if teacher else 0.0

    def __call__(self, items: Sequence[tuple[int, Group]]) -> dict[str, Batch]:
        """Return one batch, under the name of the model's argument."""
        drawn = [draw(group, self._config.negatives, epoch, self._seed) for epoch, group in items]
        if self._config.in_batch:
            groups = [group for _, group in items]
            drawn = [
                (*passages, *in_batch_negatives(group, passages, of_other_queries(group, groups, drawn)))
                for group, passages in zip(groups, drawn, strict=True)
            ]
        width = max(map(len, drawn))
        mask = torch.tensor([[place < len(passages) for place in range(width)] for passages in drawn])
        queries = [group.query for _, group in items]
        rows = [
            self._scorer.rows(query, p)[0] for query, passages in zip(queries, drawn, strict=True) for p in passages
        ]
        teacher = None
        if self._teacher is not None:
            teacher = torch.tensor(
                [
                    [self._teacher.get((query.id, p.id), self._lowest) for p in passages]
                    + [0.0] * (width - len(passages))
                    for query, passages in zip(queries, drawn, strict=True)
                ]
            )
        return {"batch": Batch(rows, mask, teacher)}


class Learner(nn.Module):
    """The adapter as the Trainer sees it: a module that returns a loss. The frozen model is no part of it.

    Args:
        adapter: what is trained.
        config: losses.
        scorer: of the method, with the frozen model.
    """

    def __init__(self, adapter: Adapter, config: TrainingConfig, scorer: RowScorer) -> None:
        super().__init__()
        self.adapter = adapter
        self._config, self._scorer = config, scorer

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return the loss and the scores `[B, G]`, of query likelihood in nats per query token."""
        scores, answered = self._learned(batch, self.adapter)
        mask = batch.mask.to(scores.device)
        teacher = None if batch.teacher is None else batch.teacher.to(scores.device)
        config = self._config
        given = {"teacher": teacher, "answered": answered}
        loss = losses.loss(config.loss, scores, mask, margin=config.margin, scale=config.loss_scale, **given)
        if config.anchor:
            with torch.no_grad():
                zero_shot, _ = self._learned(batch, None)
            loss = loss + config.anchor * losses.anchor(scores, zero_shot, mask)
        if not torch.isfinite(loss):
            # The Trainer would leave such losses out of its log, and save what came of them.
            raise ScoreError(f"the loss became {float(loss.detach())}: lower --learning-rate, or set --max-grad-norm")
        return {"loss": loss, "scores": scores.detach()}

    def _learned(self, batch: Batch, adapter: Adapter | None) -> tuple[Tensor, Tensor | None]:
        scores, answered = self._scorer.using(adapter).batch_learned(batch.rows)

        def by_group(values: Tensor) -> Tensor:
            return values.new_zeros(batch.mask.shape).masked_scatter(batch.mask.to(values.device), values)

        return by_group(scores), None if answered is None else by_group(answered)


class AdapterTrainer(Trainer):
    """A Trainer that feeds groups in a fixed order, saves the adapter alone, and evaluates by ranking dev."""

    def __init__(self, data: TrainingSet, dev: DevRanking | None, **options: Any) -> None:
        super().__init__(train_dataset=data, eval_dataset=data if dev else None, **options)
        self._data = data
        self._dev = dev

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return SequentialSampler(self._data)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log with epochs counted as they were asked for: to the Trainer, all of them are one."""
        told = self.state.epoch or 0.0
        self.state.epoch = told * self._data.epochs
        super().log(logs, start_time)
        self.state.epoch = told

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        begun = super()._init_training_state(*args, **kwargs)
        if self.state.best_global_step is not None:
            # What the Trainer keeps is a path, which is another one from elsewhere, and goes on without it.
            best = Path(self.args.output_dir or ".") / f"checkpoint-{self.state.best_global_step}"
            if not best.is_dir():
                raise StateError(f"{best} is missing, the best state of a training that is to be continued")
            self.state.best_model_checkpoint = str(best)
        # On resume the Trainer puts EarlyStoppingCallback last, and forgets that it had ended the training.
        self.callback_handler.callbacks.sort(key=lambda each: isinstance(each, KeepSteps))
        return (1, 0) if self.control.should_training_stop else begun

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Token tables are not decayed: decay would shrink every token that training never touches."""
        return [name for name in super().get_decay_parameter_names(model) if "token_table" not in name]

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Rank dev with the adapter as it is."""
        assert self._dev is not None
        learner: Any = self.accelerator.unwrap_model(self.model)
        learner.eval()
        measured = {f"eval_{name}": value for name, value in self._dev.measure(learner.adapter).items()}
        learner.train()
        self.log(dict(measured))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, measured)
        return measured

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, SafetensorError, RuntimeError) as error:  # the last is torch.save's
            if self.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)
            free = shutil.disk_usage(folder.parent).free / 2**20
            why = f"{' '.join(str(error).split())[:200]} ({free:,.1f} MiB are free there)"
            raise StateError(f"{folder} cannot be written: {why}") from error

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if not self.args.should_save:  # one process writes, and the Trainer calls this in all
            return
        folder = Path(output_dir or self.args.output_dir or ".")
        folder.mkdir(parents=True, exist_ok=True)
        learner: Any = self.accelerator.unwrap_model(self.model)
        # Not moved into place: until the Trainer's state stands beside it, which comes last, nothing here is read.
        tensors = {k: v.detach().cpu().contiguous() for k, v in learner.adapter.state_dict().items()}
        save_file(tensors, folder / WEIGHTS)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # what is written next makes the checkpoint a whole one

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self._load_adapter(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        self._load_adapter(Path(self.state.best_model_checkpoint))

    def _load_adapter(self, folder: Path) -> None:
        learner: Any = self.accelerator.unwrap_model(self.model)
        learner.adapter.load_state_dict(load_file(folder / WEIGHTS, device=str(self.args.device)))


@dataclass(frozen=True)
class Fitted:
    """What training came to."""

    history: list[dict[str, float]]
    """What the Trainer logged, in order: losses and learning rates, and dev measures under `eval_…`."""
    dev: dict[str, float | None]
    """The dev measure of the model alone, of the untrained adapter, and of the kept one; None where not measured."""
    seconds: float
    """Of training, dev evaluations included."""
    steps: int


def fit(
    scorer: RowScorer,
    adapter: Adapter,
    groups: Sequence[Group],
    collator: Collator,
    config: TrainingConfig,
    *,
    checkpoints: Path,
    seed: int,
    dev: DevRanking | None = None,
    resume: bool = False,
    baselines: bool = True,
    progress: bool = True,
    callbacks: Sequence[TrainerCallback] = (),
) -> Fitted:
    """Train an adapter in place; afterwards it is the best by dev, or, without dev, the last.

    Args:
        scorer: of the method, with the frozen model; if that has a context store, contexts are encoded once and kept.
        adapter: what is trained; on the model's device.
        groups: training queries with their passages.
        collator: makes rows of them.
        config: losses, rates, sizes. With `epochs` 0 the adapter stays untrained.
        checkpoints: folder for the Trainer's checkpoints.
        seed: of the order of queries, and of dropout.
        dev: what is measured.
        resume: continue from the newest checkpoint, if there is one; the caller knows that it is of this training.
        baselines: measure the model alone and the untrained adapter on dev as well.
        progress: show a progress bar.
        callbacks: more of the Trainer's callbacks.

    Raises:
        OptionError: options out of range, nothing to train, no memory for a step, or a launcher other than torchrun.
        StateError: a checkpoint cannot be written; the one before it is whole.
        ScoreError: the loss or the weights became infinite.
    """
    lm: Any = scorer.lm  # a decoder's
    started = time.perf_counter()
    found: dict[str, float | None] = {"zero_shot": None, "untrained": None, "trained": None}

    def measure(who: Adapter | None) -> float | None:
        if dev is None or not baselines or (who is None and not dev.zero_shot):
            return None
        (value,) = dev.measure(who).values()
        return value

    with together(lm.device):
        adapter.eval()
        newest = _newest(checkpoints) if resume else None
        found["zero_shot"] = measure(None)
        found["untrained"] = measure(adapter)
        history: list[dict[str, float]] = []
        steps = 0
        if config.epochs:
            made = _trainer(
                scorer, adapter, groups, collator, config,
                checkpoints=checkpoints, seed=seed, dev=dev, callbacks=callbacks, progress=progress,
            )  # fmt: skip
            adapter.train()
            with room_on(lm.device), checkpointed(lm, adapter) if config.gradient_checkpointing else nullcontext():
                made.train(resume_from_checkpoint=newest)
            steps = int(made.state.global_step)
            history = [
                {key: value for key, value in entry.items() if isinstance(value, (int, float))}
                for entry in made.state.log_history
                if "train_runtime" not in entry  # the summary tells of the last start alone
            ]
            found["trained"] = made.state.best_metric
            del made
            if not all(parameter.isfinite().all() for parameter in adapter.parameters()):
                raise ScoreError("the adapter's weights became infinite: lower --learning-rate, or set --max-grad-norm")
    adapter.eval()
    return Fitted(history, found, time.perf_counter() - started, steps)


def _trainer(
    scorer: RowScorer,
    adapter: Adapter,
    groups: Sequence[Group],
    collator: Collator,
    config: TrainingConfig,
    *,
    checkpoints: Path,
    seed: int,
    dev: DevRanking | None,
    callbacks: Sequence[TrainerCallback],
    progress: bool,
) -> AdapterTrainer:
    """Return a Trainer with the arguments of `fit`."""
    if not groups:
        raise OptionError("there is nothing to train on: no query has a positive passage")
    if not any(parameter.requires_grad for parameter in adapter.parameters()):
        raise OptionError("nothing of this adapter is trainable; for R, raise --mlp-layers or --token-table trainable")
    lm: Any = scorer.lm
    data = TrainingSet(groups, config.epochs, seed)
    stopping: list[TrainerCallback] = [EarlyStoppingCallback(config.patience)] if config.patience and dev else []
    ahead = [EncodeAhead(lm, adapter, data, collator, config)] if lm.keeps_contexts and not adapter.changes_lm else []
    arguments = trainer_arguments(
        config, len(data), checkpoints=checkpoints, device=lm.device, seed=seed,
        measure=dev.name if dev else None, progress=progress,
    )  # fmt: skip
    return AdapterTrainer(
        data,
        dev,
        model=Learner(adapter, config, scorer),
        args=arguments,
        data_collator=collator,
        callbacks=[*ahead, *stopping, *callbacks],
    )


def _newest(checkpoints: Path) -> str | None:
    """Return the last checkpoint that is whole: the state is what the Trainer writes last."""
    found = [(int(path.name.partition("-")[2]), path) for path in checkpoints.glob("checkpoint-*")]
    for _, path in sorted(found, reverse=True):
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return str(path)
    return None
