"""States of a training, kept as it goes on (`qpeft train --keep-every`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback


class KeepSteps(TrainerCallback):
    """Keeps the adapter as it is every so many steps, before the first, and after the last.

    Args:
        every: steps.
        save: writes it; called with the number of steps done.
    """

    def __init__(self, every: int, save: Callable[[int], None]) -> None:
        self._every, self._save = every, save

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep what is untrained."""
        if state.global_step == 0:
            self._save(0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep what was trained so far."""
        if state.global_step % self._every == 0 or control.should_training_stop:
            self._save(state.global_step)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the last step of a training whose patience is at its end, before the best state comes back."""
        if state.global_step % self._every and control.should_training_stop and state.global_step < state.max_steps:
            self._save(state.global_step)
