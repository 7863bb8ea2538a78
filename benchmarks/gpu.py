"""Everything that needs a large GPU, in one call of less than nine minutes that ends in a table.

    python benchmarks/gpu.py --output benchmarks/results/gpu.json
    python benchmarks/gpu.py --device cpu --shape tiny --pairs 8       # the same code, to see that it runs

For each shape (random bfloat16 weights, made on the device): pairs per second of ours without a passage cache, with an
empty one and with a filled one; of the plain loop; of other sizes of batches and attention kernels; of compiled norms
and MLPs; of rows that are packed into one sequence instead of padded, and of batches of equal length; of the bare
matrix products that the pairs need; training rows per second, of hints in three ways (`training.py`) and of LoRA; and
peak memory above the weights.
Then what was wanted, and whether it is met. What scores is compared with the plain loop in float32 on the first rows:
a way that is more than twice as far from it as the plain loop in bfloat16 is void, and the script fails at its end.
What cannot run here, or for which no time is left, is named with the reason.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import tables
import training
from ceiling import Ceiling, needed
from naive import padded_scores
from qpeft.lm.causal import CausalLM
from qpeft.lm.compiled import Compiled
from qpeft.lm.context_store import ContextStore
from qpeft.lm.pretrained import token_log_probs
from qpeft.model_config import EMBEDDED
from qpeft.template import Row
from rounds import Case, interleave, made, ratio, set_up, synchronize
from shapes import SHAPES, open_lm

DEFAULT = ("qwen3-0.6b", "mistral-7b", "llama-3.1-8b")
VOID = "void"
TOLERANCE = 2.0
"""How many times as far from float32 a way may be as the plain loop in bfloat16."""
REFERENCE_ROWS = 32
"""Rows that are scored in float32 too."""
STORE = 24 * 2**30
OURS, COLD, WARM = "qpeft", "qpeft, passage cache empty", "qpeft, passage cache filled"
BARE = "matrix products alone"
KERNELS = ("sdpa", "eager", "flash_attention_2")
PACKED = ("flash_attention_2", "sdpa")
"""Kernels that keep packed rows apart by their positions."""
FLEX = "flex_attention"
"""A kernel for both, which is compiled for each new shape: measured last, and on GPUs alone."""
LOOP_ROWS = (16, 64)
BUDGETS = (8_192, 65_536)
"""Tokens of a batch that are measured beside the usual number."""
WANTED = ((OURS, BARE, 0.6), (OURS, "plain loop", 3.0), (WARM, OURS, 4.0))
"""Times as many pairs a second; of several plain loops, the quicker."""
TRAINING_BATCH, TRAINING_STORE = 8, 8 * 2**30


def varied_rows(count: int, passages: int) -> list[Row]:
    """Return random rows whose lengths vary as those of passages do; each passage stands in several."""
    rng = random.Random(0)
    texts = [
        tuple(rng.randrange(1000, 29_000) for _ in range(min(400, max(40, round(rng.gauss(150, 55))))))
        for _ in range(passages)
    ]
    rows = []
    for i in range(count):
        context = (101, 2000, 1024, *texts[i % passages])
        query = tuple(rng.randrange(1000, 29_000) for _ in range(rng.randint(6, 20)))
        scored = (False, False, *[True] * len(query))
        rows.append(Row(context, (3160, 1024, *query), scored, (3, len(context)), None, query))
    return rows


def means(lm: CausalLM, rows: Sequence[Row]) -> list[float]:
    """Return our scores."""
    return [float(value.target.mean()) for value in lm.log_probs(rows)]


def in_float32(lm: CausalLM, rows: Sequence[Row]) -> list[float]:
    """Return the plain loop's scores with the weights in float32; afterwards they are what they were, bit by bit."""
    dtypes = [weight.dtype for weight in lm.model.parameters()]
    for weight in lm.model.parameters():
        weight.data = weight.data.float()
    scores = loop(lm, rows, LOOP_ROWS[0])
    for weight, dtype in zip(lm.model.parameters(), dtypes, strict=True):
        weight.data = weight.data.to(dtype)
    return scores


def loop(lm: CausalLM, rows: Sequence[Row], count: int) -> list[float]:
    """Return the plain loop's scores, `count` rows at a time in the order given."""
    scores: list[float] = []
    for start in range(0, len(rows), count):
        some = rows[start : start + count]
        ids = [[*row.context, *row.target] for row in some]
        scores += padded_scores(lm.model, ids, [sum(row.scored) for row in some])
    return scores


@torch.inference_mode()
def packed(lm: CausalLM, rows: Sequence[Row], budget: int) -> list[float]:
    """Return scores of rows that stand one behind the other in sequences of about `budget` tokens, without padding."""
    scores: list[float] = []
    waiting = list(rows)
    while waiting:
        own = [waiting.pop(0)]
        while waiting and sum(map(len, own)) + len(waiting[0]) <= budget:
            own.append(waiting.pop(0))
        ids, positions, keep, labels, counts = [], [], [], [], []
        for row in own:
            tokens = [*row.context, *row.target]
            scored = [*[False] * len(row.context), *row.scored]
            ids += tokens[:-1]
            positions += range(len(tokens) - 1)
            keep += scored[1:]
            labels += [token for token, wanted in zip(tokens, scored, strict=True) if wanted]
            counts.append(sum(scored))
        logits = lm.model(
            input_ids=torch.tensor([ids], device=lm.device),
            position_ids=torch.tensor([positions], device=lm.device),
            logits_to_keep=torch.tensor([keep], device=lm.device),
            use_cache=False,
        ).logits
        values = token_log_probs(logits.reshape(-1, logits.shape[-1]), torch.tensor(labels, device=lm.device))
        scores += [float(value.mean()) for value in torch.split(values, counts)]
    return scores


def equal_lengths(lm: CausalLM, rows: Sequence[Row]) -> list[float]:
    """Return scores from batches in which all rows have the same length, so that nothing is padded."""
    groups: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(len(row), []).append(i)
    scores = [0.0] * len(rows)
    for group in groups.values():
        for i, score in zip(group, means(lm, [rows[i] for i in group]), strict=True):
            scores[i] = score
    return scores


class Bench:
    """One model, and the ways to score some rows with it."""

    def __init__(self, shape: str, args: argparse.Namespace) -> None:
        self.shape, self.args = shape, args
        self.lm = open_lm(shape, args.device)
        self.kernel = self.lm.attention_kernel
        self.rows = varied_rows(args.pairs, max(1, args.pairs // 4))
        self.filled = ContextStore(STORE)
        self.lm.store = self.filled
        means(self.lm, self.rows)
        self.lm.store = None
        self.reference = in_float32(self.lm, self.rows[:REFERENCE_ROWS])
        self.allowed = TOLERANCE * self.off(loop(self.lm, self.rows[:REFERENCE_ROWS], LOOP_ROWS[0]))
        self.scores: dict[str, list[float]] = {}
        self.peaks: dict[str, float] = {}
        self.found: list[dict[str, Any]] = []
        self.targets: list[dict[str, Any]] = []
        self.flops = 0

    def ways(self) -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
        """Return what is to be measured: what sets it up, and what does the work."""
        lm, rows, budget = self.lm, self.rows, self.args.packed_tokens

        usual_tokens = lm.batch_tokens

        def using(
            kernel: str,
            store: Callable[[], ContextStore | None] = lambda: None,
            tokens: int = usual_tokens,
            *,
            compiled: bool = False,
        ) -> Callable[[], None]:
            def use() -> None:
                lm.model.set_attn_implementation(kernel)
                lm.store, lm.batch_tokens = store(), tokens
                if compiled and lm.compiled is None:
                    lm.compiled = Compiled(lm.model)
                if lm.compiled is not None:
                    lm.compiled.on = compiled

            return use

        usual = using(self.kernel)
        bare = Ceiling(*needed(lm, rows), torch.bfloat16, self.args.device)
        self.flops = bare.flops
        ways = {
            OURS: (usual, lambda: means(lm, rows)),
            COLD: (using(self.kernel, lambda: ContextStore(STORE)), lambda: means(lm, rows)),
            WARM: (using(self.kernel, lambda: self.filled), lambda: means(lm, rows)),
            BARE: (usual, bare),
            **{f"plain loop, {n} rows": (usual, lambda n=n: loop(lm, rows, n)) for n in LOOP_ROWS},
            **{
                f"qpeft, batches of {n:,} tokens": (using(self.kernel, tokens=n), lambda: means(lm, rows))
                for n in BUDGETS
            },
            "qpeft, batches of equal length": (usual, lambda: equal_lengths(lm, rows)),
            **{f"qpeft, attention {kernel}": (using(kernel), lambda: means(lm, rows)) for kernel in KERNELS},
            **{f"packed rows, {kernel}": (using(kernel), lambda: packed(lm, rows, budget)) for kernel in PACKED},
        }
        ways["qpeft --compile yes"] = (using(self.kernel, compiled=True), lambda: means(lm, rows))
        if self.args.device != "cpu":
            ways[f"qpeft, attention {FLEX}"] = (using(FLEX), lambda: means(lm, rows))
            ways[f"packed rows, {FLEX}"] = (using(FLEX), lambda: packed(lm, rows, budget))
        return ways

    def score(self, until: float) -> None:
        """Run every way once, for its scores and its memory, and then those that ran in turn, while there is time."""
        cases: dict[str, Case] = {}
        for name, (use, work) in self.ways().items():
            if time.monotonic() > until:
                self.absent(name, "no time left")
                continue
            try:
                use()
                self.peaks[name] = peak_gib(lambda name=name, work=work: self.scores.__setitem__(name, work()))
            except Exception as error:  # what cannot run here is a finding
                self.absent(name, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:120])
                continue
            cases[name] = Case(work, len(self.rows), before=use)
        rounds = 0
        while rounds < self.args.rounds and (rounds == 0 or time.monotonic() < until):
            interleave(cases, 1)
            rounds += 1
        for name, case in cases.items():
            off = 0.0 if name == BARE else self.off(self.scores[name])
            if not off <= self.allowed:
                self.absent(name, f"{VOID}: {off:.3g} nats off float32, {self.allowed:.3g} allowed")
                continue
            self.note(name, case.result()["pairs/s"], "pairs/s", self.peaks[name], seconds=case.seconds, off=off)
        if OURS in cases:
            self.note("qpeft, products done", self.flops / statistics.median(cases[OURS].seconds) / 1e12, "TFLOP/s")
        usual_loop = min(
            (name for name in cases if name.startswith("plain loop")), key=lambda n: sum(cases[n].seconds), default=None
        )
        for case, against, wanted in WANTED:
            pair = [cases.get(case), cases.get(usual_loop if against == "plain loop" else against)]
            found = ratio(*pair)["median"] if all(pair) else None
            self.targets.append(
                {"case": f"{case} / {against}", "wanted": wanted, "measured": found, "met": found and found >= wanted}
            )

    def off(self, scores: Sequence[float]) -> float:
        """Return how far scores are from those in float32: root mean square over the first rows, nats per token."""
        gaps = [a - b for a, b in zip(scores, self.reference, strict=False)]
        return math.sqrt(sum(gap**2 for gap in gaps) / len(gaps))

    def train(self, until: float) -> None:
        """Measure training of hints as `training.py` does, and of LoRA on whole rows."""
        count = self.args.training_rows
        rows = training.make_rows(count, max(1, count // 2), 150, 18)
        self.lm.model.set_attn_implementation(self.kernel)
        for adapter in ("qpeft_a", "lora"):
            if time.monotonic() > until:
                self.absent(f"training, {adapter}", "no time left")
                continue
            modes = training.MODES if adapter == "qpeft_a" else (training.PLAIN,)
            try:
                measured = training.Training(self.lm, adapter, rows, TRAINING_BATCH, TRAINING_STORE)
                seen = training.measure(measured, min(2, self.args.rounds), modes)
            except Exception as error:
                self.absent(f"training, {adapter}", f"{type(error).__name__}: {error}"[:120])
                continue
            for mode, case in seen["modes"].items():
                self.note(f"training, {adapter}, {mode}", case["pairs/s"], "rows/s", peak=case["peak MiB"] / 1024)
            for mode, why in seen["absent"].items():
                self.absent(f"training, {adapter}, {mode}", why)
            if adapter == "qpeft_a":
                self.targets += seen["targets"]

    def note(self, what: str, value: float, unit: str, peak: float | None = None, **more: Any) -> None:
        """Keep a finding."""
        entry = {"what": what, "value": value, "unit": unit, **more}
        if peak is not None:
            entry["peak GiB"] = round(peak, 3)
        self.found.append(entry)

    def absent(self, what: str, why: str) -> None:
        """Keep what could not be measured, and why."""
        self.found.append({"what": what, "absent": why})


def product_rate(device: str) -> float:
    """Return what one large square bfloat16 product reaches, in TFLOP/s: the best of ten."""
    size = 8192 if device != "cpu" else 1024
    left, right = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    best = float("inf")
    for _ in range(10):
        synchronize()
        started = time.perf_counter()
        left @ right
        synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best / 1e12


def peak_gib(work: Callable[[], Any]) -> float:
    """Run and return the peak of memory above what was taken before; 0 where it is not the GPU's."""
    if not torch.cuda.is_available():
        work()
        return 0.0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def measure(shape: str, args: argparse.Namespace, until: float) -> dict[str, Any]:
    """Return the findings of one shape, and free its memory."""
    bench = None
    found: list[dict[str, Any]] = []
    try:
        bench = Bench(shape, args)
        found = bench.found
        bench.note("one large bf16 product", round(product_rate(args.device), 2), "TFLOP/s")
        started = time.monotonic()
        bench.score(started + 0.7 * (until - started))
        bench.train(until)
    except Exception as error:  # what was measured before must not be lost with it
        found.append({"what": "the rest", "absent": f"{type(error).__name__}: {error}"[:200]})
    targets = bench.targets if bench else []
    del bench
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return {"found": found, "targets": targets}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shape",
        action="append",
        choices=[EMBEDDED, *sorted(SHAPES)],
        help="default: qwen3-0.6b, mistral-7b and llama-3.1-8b",
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--pairs", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--packed-tokens", type=int, default=8192)
    parser.add_argument("--training-rows", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=8.0, help="what has not begun by then is left out")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args(arguments)
    set_up(args.threads)
    shapes = args.shape or DEFAULT
    started = time.monotonic()
    result: dict[str, Any] = {"kind": "gpu", "device": args.device, "pairs": args.pairs, "shapes": {}}
    for place, shape in enumerate(shapes, start=1):
        print(f"{shape}: {time.monotonic() - started:.0f} s", file=sys.stderr)
        result["shapes"][shape] = measure(shape, args, started + args.minutes * 60 * place / len(shapes))
        result["made"] = made(seconds=round(time.monotonic() - started))
        if args.output:  # after each shape, so that an interruption costs one
            args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(tables.render(result))
    if any(each.get("absent", "").startswith(VOID) for shape in result["shapes"].values() for each in shape["found"]):
        sys.exit("some ways disagree with ours")


if __name__ == "__main__":
    main()
