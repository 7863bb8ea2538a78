"""Options of training; apart from the trainer, so that they do not ask for torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from qpeft.errors import OptionError, at_least, nearest
from qpeft.options import Checked

Loss = Literal["both", "point", "pair", "softmax", "cross_entropy", "sft", "ranknet", "plackett_luce", "margin_mse"]


@dataclass(frozen=True)
class TrainingConfig(Checked):
    """Training."""

    loss: Loss = "both"
    """both: likelihood of positives plus hinge (Q-PEFT); or a part of it, or another ranking loss."""
    margin: float = 0.5
    """Of the hinge, in nats per query token."""
    loss_scale: float = 5.0
    """Factor on scores in softmax, ranknet and plackett_luce."""
    anchor: float = 0.0
    """Weight of the squared distance from the zero-shot scores."""
    negatives: int = 3
    """Negatives per query and step."""
    in_batch: bool = False
    """Passages of the other queries of a batch, positives and negatives, are negatives too."""
    learning_rate: float = 1e-3
    """Peak learning rate of AdamW."""
    scheduler: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    """Course of the learning rate."""
    warmup: float = 0.03
    """Share of the steps in which it rises."""
    weight_decay: float = 0.0
    """Of AdamW; never on a token table."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm; 0: not."""
    epochs: int = 4
    """Passes over the training queries."""
    batch_queries: int = 8
    """Queries in a step."""
    gradient_accumulation: int = 1
    """Batches in a step."""
    gradient_checkpointing: bool = False
    """Compute layers again in the backward pass instead of keeping what they computed: less memory (lora)."""
    evaluations: int = 4
    """How often the dev ranking is measured at most, the last time at the end."""
    patience: int = 0
    """Stop after so many evaluations without a better one; 0: never."""
    measure: str = "RR@10"
    """What dev is judged by, and the best checkpoint is kept by."""
    report_to: tuple[str, ...] = ()
    """tensorboard, wandb, mlflow: where transformers sends its logs; TensorBoard's stand in OUTPUT.checkpoints/runs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for least, names in (
            (1, ("batch_queries", "gradient_accumulation", "evaluations")),
            (0, ("epochs", "negatives", "patience", "anchor", "weight_decay", "max_grad_norm", "warmup")),
        ):
            at_least(least, **{name: getattr(self, name) for name in names})
        if not self.learning_rate > 0:
            raise OptionError(f"--learning-rate is {self.learning_rate}; it must be above 0")
        if self.warmup > 1:
            raise OptionError(f"--warmup is {self.warmup}; it is a share of the steps, at most 1")
        if self.report_to and self.report_to not in (("all",), ("none",)):
            _check_trackers(self.report_to)


def _check_trackers(names: Iterable[str]) -> None:
    """Raise OptionError for a tracker that transformers does not know, or that is not installed."""
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            raise OptionError(f"--report-to {name}: no such tracker{nearest(name, INTEGRATION_TO_CALLBACK)}")
        try:
            INTEGRATION_TO_CALLBACK[name]()
        except (ImportError, RuntimeError) as error:
            raise OptionError(f"--report-to {name}: {error}") from error


@dataclass(frozen=True)
class ReadOutTraining(TrainingConfig):
    """Training of methods that read the last token."""

    loss: Loss = "softmax"
    """softmax: the positive against its group; cross_entropy: each pair by itself; sft: yes_no's answer as a word; …"""
    loss_scale: float = 1.0


@dataclass(frozen=True)
class Authors(TrainingConfig):
    """Training, with the settings of the authors' code."""

    margin: float = 0.0
    negatives: int = 1
    in_batch: bool = True
    learning_rate: float = 3e-2
    scheduler: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "constant"
    warmup: float = 0.0
    weight_decay: float = 0.01
    max_grad_norm: float = 0.0
    epochs: int = 20
    batch_queries: int = 4
    evaluations: int = 20
    patience: int = 6
