"""Which settings score pairs quickest here: one is changed at a time, and the winner must beat the default."""

from __future__ import annotations

import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch

from qpeft import memory
from qpeft.commands._progress import progress_bar
from qpeft.errors import ModelError, OptionError
from qpeft.lm.cpu_attention import NAME
from qpeft.loading import choose_device, load_lm, tuning_key_of
from qpeft.model_config import ModelConfig
from qpeft.provenance import provenance
from qpeft.template import Row
from qpeft.tuning import Tuning, tuning_file, write_tuning

ROUNDS = 3
MARGIN = 0.98
"""Share of the default's time that a winner may take: what is not clearly quicker is noise."""


def tune(config: ModelConfig, rows_of: Callable[[Any], Sequence[Row]]) -> None:
    """Time settings, print them, and keep the winner for the next time that the model is opened.

    Args:
        config: the model, and whether passages are cached; options that are given are not varied.
        rows_of: returns rows to score with an opened model.
    """
    device = choose_device(config.device)
    key = tuning_key_of(config, device)
    write_tuning(key, None)  # so that the default is what it would be without
    timer = _Timer(config, rows_of)
    default = best = timer.default
    times: dict[Tuning, float] = {}
    fields = list(dataclasses.fields(Tuning))
    with progress_bar("tune", len(fields) + 1, unit="settings") as bar:
        for field in fields:
            for value in _choices(field.name, default, config, device):
                trial = dataclasses.replace(best, **{field.name: value})
                seconds = timer.seconds(trial)
                if seconds is not None:
                    times[trial] = seconds
            if best not in times:
                times[best] = timer.seconds(best) or float("inf")
            best = min(times, key=lambda trial: times[trial])
            bar.advance()
        won, before = timer.duel(best, default)
        bar.advance()
    for trial, seconds in sorted(times.items(), key=lambda item: item[1]):
        print(f"{timer.pairs / seconds:8,.1f} passages/s  {_spell(trial)}")
    if best == default or won > MARGIN * before:
        print(f"the default stays: {_spell(default)}")
        return
    write_tuning(
        key, best, model=config.model, passages_per_second=timer.pairs / won, default=timer.pairs / before,
        made=provenance(),
    )  # fmt: skip
    print(f"kept in {tuning_file()}: {_spell(best)}, {before / won:.2f} times the default's speed")


class _Timer:
    """Scores the same rows under different settings; for some the model is opened again."""

    def __init__(self, config: ModelConfig, rows_of: Callable[[Any], Sequence[Row]]) -> None:
        self._config = config
        self._open(config)
        self._kernel = self._lm.attention_kernel
        self._rows = list(rows_of(self._lm))
        self.default = Tuning(
            self._lm.dtype,
            self._kernel,
            self._lm.batch_tokens,
            torch.get_num_threads() if self._lm.device.type == "cpu" else None,
            self._lm.compiled is not None,
        )

    @property
    def pairs(self) -> int:
        return len(self._rows)

    def _open(self, config: ModelConfig) -> None:
        self._lm: Any = None  # two of them may not fit
        memory.give_back()
        self._lm = load_lm(config)

    def _set(self, trial: Tuning) -> bool:
        """Return whether the model can be run so."""
        if (self._lm.dtype, self._lm.compiled is not None) != (trial.dtype, trial.compiled):
            compiled: Literal["yes", "no"] = "yes" if trial.compiled else "no"
            try:
                self._open(dataclasses.replace(self._config, dtype=trial.dtype, compile=compiled))
            except (OptionError, ModelError, RuntimeError):  # it does not compile, or there is no memory for it
                self._open(self._config)
                return False
        if self._lm.attention_kernel != trial.attention_kernel:
            try:
                self._lm.model.set_attn_implementation(trial.attention_kernel)
            except (ValueError, ImportError):
                return False
        if self._lm.store is not None:
            self._lm.store.clear()
        self._lm.batch_tokens = trial.batch_tokens
        if trial.threads is not None:
            torch.set_num_threads(trial.threads)
        return True

    def seconds(self, trial: Tuning) -> float | None:
        """Return the median time of all rows, or None where the model cannot be run so."""
        if not self._set(trial):
            return None
        try:
            times = [self._round() for _ in range(ROUNDS + 1)]
        except (NotImplementedError, ValueError, RuntimeError, ModelError, OptionError):
            return None
        return statistics.median(times[1:])

    def duel(self, one: Tuning, other: Tuning) -> tuple[float, float]:
        """Return median times of two settings, measured in turns."""
        times: dict[Tuning, list[float]] = {one: [], other: []}
        for _ in range(ROUNDS + 2):
            for trial, found in times.items():
                self._set(trial)
                self._round()
                found.append(self._round())
        return statistics.median(times[one]), statistics.median(times[other])

    def _round(self) -> float:
        started = time.perf_counter()
        self._lm.log_probs(self._rows)
        return time.perf_counter() - started


def _choices(name: str, default: Tuning, config: ModelConfig, device: torch.device) -> Iterator[Any]:
    """Yield other values of a setting, unless it was given."""
    cpu = device.type == "cpu"
    if name == "dtype" and config.dtype == "auto":
        yield from {"float32", "bfloat16"} - {default.dtype}
    elif name == "attention_kernel" and config.attention_kernel == "auto":
        names = ["eager", "sdpa", NAME] if cpu else ["eager", "sdpa", "flash_attention_2", "flex_attention"]
        yield from (other for other in names if other != default.attention_kernel)
    elif name == "batch_tokens" and config.batch_tokens is None:
        yield from (int(default.batch_tokens * factor) for factor in (0.5, 2, 4))
    elif name == "threads" and cpu and "OMP_NUM_THREADS" not in os.environ:
        yield from (count for count in range(1, (os.cpu_count() or 1) + 1) if count != default.threads)
    elif name == "compiled" and config.compile == "auto":
        yield True


def _spell(trial: Tuning) -> str:
    return ", ".join(f"{name} {value}" for name, value in dataclasses.asdict(trial).items() if value is not None)
