"""Side by side: every case once a round, round after round, so that what disturbs the machine disturbs all of them.

A case's time is the median of its rounds. How much quicker one case is than another is the median of the rounds' own
ratios, given with the smallest and the largest.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

from qpeft import memory
from qpeft.provenance import provenance


@dataclass
class Case:
    """Something to time.

    Args:
        run: does the work on `pairs` pairs.
        pairs: how many that are.
        before: is called untimed before each run.
    """

    run: Callable[[], Any]
    pairs: int
    before: Callable[[], Any] | None = None
    seconds: list[float] = field(default_factory=list, init=False)
    cpu_seconds: list[float] = field(default_factory=list, init=False)

    def time(self) -> None:
        """Run once and keep wall clock and processor time."""
        if self.before is not None:
            self.before()
        synchronize()
        wall, cpu = time.perf_counter(), time.process_time()
        self.run()
        synchronize()
        self.seconds.append(time.perf_counter() - wall)
        self.cpu_seconds.append(time.process_time() - cpu)

    def result(self) -> dict[str, Any]:
        """Return pairs per second (median, slowest and quickest round), and the seconds of all rounds."""
        return {
            "pairs/s": round(self.pairs / statistics.median(self.seconds), 2),
            "slowest": round(self.pairs / max(self.seconds), 2),
            "quickest": round(self.pairs / min(self.seconds), 2),
            "seconds": [round(s, 4) for s in self.seconds],
            "cpu seconds": [round(s, 4) for s in self.cpu_seconds],
        }


def interleave(cases: dict[str, Case], rounds: int) -> None:
    """Time all cases `rounds` times, in turn; every case must have run before, so that nothing is made anew.

    Every second round goes backwards: what a case leaves behind does not always meet the same other.
    """
    for number in range(rounds):
        for name, case in list(cases.items())[:: -1 if number % 2 else 1]:
            case.time()
            print(f"round {number + 1}  {name:42} {case.pairs / case.seconds[-1]:10.1f} pairs/s", file=sys.stderr)


def ratio(case: Case, other: Case) -> dict[str, float]:
    """Return how many times as many pairs a second `case` does as `other`: median, lowest and highest of the rounds.

    `cpu` is the same of processor time, which other work on the machine disturbs less.
    """
    share = case.pairs / other.pairs
    each = [share * theirs / mine for mine, theirs in zip(case.seconds, other.seconds, strict=True)]
    cpu = [share * theirs / mine for mine, theirs in zip(case.cpu_seconds, other.cpu_seconds, strict=True)]
    return {
        "median": round(statistics.median(each), 3),
        "low": round(min(each), 3),
        "high": round(max(each), 3),
        "cpu": round(statistics.median(cpu), 3),
    }


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def set_up(threads: int | None) -> None:
    """Prepare this process: threads, quiet libraries, settings as they come, and memory held as `qpeft rerank` does.

    Args:
        threads: of torch and the tokenizers; None leaves torch's choice.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    os.environ["RAYON_NUM_THREADS"] = str(torch.get_num_threads())
    os.environ["QPEFT_CACHE"] = os.devnull  # what `qpeft doctor --tune` found here is left out
    memory.hold()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def made(**facts_: Any) -> dict[str, Any]:
    """Return when, with what versions and on what hardware a result was made, and how busy the machine was."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return provenance(threads=torch.get_num_threads(), **{"load of the machine": load}, **facts_)
