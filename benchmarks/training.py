"""Training with contexts encoded once against the plain path: rows per second, and memory for backpropagation.

    python benchmarks/training.py                              # the embedded model, CPU
    python benchmarks/training.py --shape qwen3-0.6b --device cuda --output benchmarks/results/training-gpu.json

Rows have a passage of 150 tokens and about 40 tokens of hint, cue and query. Three ways train on the same rows, in
turn: whole rows go through the model, and gradients through all of them; contexts are encoded at every step, without
gradients; and contexts are kept from the first epoch on. Shapes are random weights of a public configuration.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import memory
import tables
from qpeft import adapters
from qpeft.lm.causal import CausalLM
from qpeft.lm.context_store import ContextStore
from qpeft.memory import give_back
from qpeft.model_config import EMBEDDED
from qpeft.template import Row
from rounds import Case, interleave, made, ratio, set_up, synchronize
from shapes import SHAPES, open_lm

PLAIN, ENCODED, KEPT = MODES = ("whole rows", "contexts encoded at every step", "contexts kept")
WANTED = {ENCODED: 2.0, KEPT: 4.0}
"""Times as many rows a second as with whole rows."""
SAVED = 1 / 3
"""Of what whole rows keep for backpropagation."""


def make_rows(count: int, passages: int, passage_tokens: int, query_tokens: int) -> list[Row]:
    """Return rows with random tokens, several queries on each passage as in training."""
    rng = random.Random(0)
    texts = [tuple(rng.randrange(1000, 29_000) for _ in range(passage_tokens)) for _ in range(passages)]
    rows = []
    for i in range(count):
        context = (101, 2000, 1024, *texts[i % passages])
        query = tuple(rng.randrange(1000, 29_000) for _ in range(query_tokens))
        target = (3160, 1024, *query)
        scored = (False, False, *[True] * query_tokens)
        rows.append(Row(context, target, scored, (3, len(context)), len(context), query))
    return rows


class Training:
    """A model, an untrained adapter, and rows to train on.

    Args:
        lm: the frozen model.
        adapter: name of the adapter.
        rows: of an epoch.
        batch: rows of a step.
        store: bytes for kept contexts.
    """

    def __init__(self, lm: CausalLM, adapter: str, rows: list[Row], batch: int, store: int) -> None:
        self.lm, self.rows, self._batch = lm, rows, batch
        self._stores = {PLAIN: None, ENCODED: ContextStore(0), KEPT: ContextStore(store)}
        torch.manual_seed(0)
        self.adapter = adapters.build(adapter, adapters.load(adapter).Config(), lm)
        self.adapter.train()
        self._optimiser = torch.optim.AdamW(self.adapter.parameters(), lr=1e-3)

    def use(self, mode: str) -> None:
        """Get ready for one way."""
        self.lm.store = self._stores[mode]

    def epoch(self) -> None:
        """Train on every row."""
        for first in range(0, len(self.rows), self._batch):
            self._loss(self.rows[first : first + self._batch]).backward()
            self._optimiser.step()
            self._optimiser.zero_grad()

    def saved(self) -> int:
        """Return the bytes that a step keeps for backpropagation, weights and kept contexts left out."""
        known = {
            w.untyped_storage().data_ptr() for module in (self.lm.model, self.adapter) for w in module.parameters()
        }
        found: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                found[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = self._loss(self.rows[: self._batch])
        loss.backward()
        self._optimiser.zero_grad()
        return sum(found.values())

    def peak(self) -> int:
        """Return the bytes that memory grows by in an epoch, at most."""
        on_gpu = self.lm.device.type == "cuda"
        synchronize()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.epoch()
            return torch.cuda.max_memory_allocated() - before
        give_back()
        memory.reset_peak()
        now = memory.resident_mib()
        self.epoch()
        return int((memory.peak_mib() - now) * 2**20)

    def _loss(self, rows: list[Row]) -> torch.Tensor:
        return -self.lm.score(rows, [self.adapter] * len(rows))[0].mean()


def measure(training: Training, rounds: int, modes: Sequence[str] = MODES) -> dict[str, Any]:
    """Return what each way came to, how they compare, and which ran out of memory."""
    cases: dict[str, Case] = {}
    space: dict[str, dict[str, float]] = {}
    absent: dict[str, str] = {}
    forth: dict[str, int] = {}
    for mode in modes:
        training.use(mode)
        try:
            training.epoch()
            saved, before = training.saved(), training.lm.computed.flops
            space[mode] = {"saved MiB": saved / 2**20, "peak MiB": training.peak() / 2**20}
            after = training.lm.computed.flops
            if before is not None and after is not None:
                forth[mode] = after - before  # of the epoch whose memory was measured
        except torch.OutOfMemoryError:
            absent[mode] = "out of memory"
            continue
        cases[mode] = Case(training.epoch, len(training.rows), before=lambda mode=mode: training.use(mode))
    interleave(cases, rounds)
    training.lm.store = None
    results = {
        mode: case.result() | {name: round(value, 1) for name, value in space[mode].items()}
        for mode, case in cases.items()
    }
    against = {mode: ratio(case, cases[PLAIN]) if PLAIN in cases else None for mode, case in cases.items()}
    allowed = products_allow(forth) if set(forth) == set(MODES) else {}
    found = {"modes": results, "absent": absent, "against": against, "products allow": allowed}
    return {**found, "targets": list(targets(results, against))}


def products_allow(forth: dict[str, int]) -> dict[str, float]:
    """Return how many times as quick as whole rows each way would be if matrix products took all of the time.

    Back, where gradients flow, there are as many as forth: the model is frozen, and has no gradients of its own.

    Args:
        forth: FLOPs of an epoch's forward passes.
    """
    whole, kept = 2 * forth[PLAIN], 2 * forth[KEPT]
    return {PLAIN: 1.0, ENCODED: round(whole / (forth[ENCODED] + forth[KEPT]), 2), KEPT: round(whole / kept, 2)}


def targets(results: dict[str, Any], against: dict[str, Any]) -> Any:
    """Yield what was wanted, what was measured and whether that is met."""
    for mode, wanted in WANTED.items():
        found = against.get(mode)
        met = None if found is None else found["median"] >= wanted
        yield {"case": f"{mode}: times the rows/s", "wanted": wanted, "measured": found and found["median"], "met": met}
    share = None
    if PLAIN in results and ENCODED in results:
        share = round(results[ENCODED]["saved MiB"] / results[PLAIN]["saved MiB"], 3)
    met = None if share is None else share <= SAVED
    yield {"case": "kept for backpropagation, share of whole rows", "wanted": SAVED, "measured": share, "met": met}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=[EMBEDDED, *SHAPES], default=EMBEDDED)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--adapter", default="qpeft_a")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--passages", type=int, default=64)
    parser.add_argument("--passage-tokens", type=int, default=150)
    parser.add_argument("--query-tokens", type=int, default=18)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--store", type=float, default=4.0, help="GiB for kept contexts")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args(arguments)
    set_up(args.threads)
    lm = open_lm(args.shape, args.device)
    rows = make_rows(args.rows, args.passages, args.passage_tokens, args.query_tokens)
    found = measure(Training(lm, args.adapter, rows, args.batch, int(args.store * 2**30)), args.rounds)
    settings = {key: value for key, value in vars(args).items() if key not in ("output", "shape", "threads")}
    result = {"kind": "training", "shape": args.shape, "dtype": lm.dtype, "settings": settings, **found, "made": made()}
    print(tables.render(result))
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
