"""Training with contexts encoded once against the plain path: rows per second, peak memory, and the same gradients.

    python benchmarks/training.py                              # the embedded model, CPU
    python benchmarks/training.py --shape qwen3-0.6b --device cuda --output benchmarks/results/training-h100.json

Rows have a passage of 150 tokens and about 40 tokens of hint, cue and query. Three ways are measured on the same rows:
the plain path (the whole row goes through the model, gradients are kept for all of it), contexts encoded at every step
(no gradients for them), and contexts kept from the first epoch on. Shapes are random weights of a public configuration.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

from qpeft import adapters
from qpeft.context_store import ContextStore
from qpeft.lm import CausalLM
from qpeft.model_config import EMBEDDED
from qpeft.provenance import provenance
from qpeft.template import Row
from shapes import SHAPES, open_lm

MODES = ("plain", "encoded", "kept")


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


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure(lm: CausalLM, mode: str, adapter_name: str, args: argparse.Namespace) -> dict[str, float]:
    """Return rows/s of the last epoch, and the peak of memory above what model and adapter take."""
    lm.store = None if mode == "plain" else ContextStore(int(args.store * 2**30) if mode == "kept" else 0)
    module = adapters.load(adapter_name)
    torch.manual_seed(0)
    adapter = module.build(module.Config(), lm)
    adapter.train()
    rows = make_rows(args.rows, args.passages, args.passage_tokens, args.query_tokens)
    optimiser = torch.optim.AdamW(adapter.parameters(), lr=1e-3)
    before = torch.cuda.memory_allocated() if lm.device.type == "cuda" else 0
    for epoch in range(2):
        if epoch and lm.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        synchronize(lm.device)
        started = time.perf_counter()
        for first in range(0, len(rows), args.batch):
            batch = rows[first : first + args.batch]
            values, _ = lm.score(batch, [adapter] * len(batch))
            (-values.mean()).backward()
            optimiser.step()
            optimiser.zero_grad()
        synchronize(lm.device)
        seconds = time.perf_counter() - started
    if lm.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() - before - (0 if lm.store is None else lm.store.bytes_kept)
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"rows/s": round(len(rows) / seconds, 2), "peak MiB": round(peak / 2**20)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=[EMBEDDED, *SHAPES], default=EMBEDDED)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--adapter", default="qpeft_a")
    parser.add_argument("--mode", choices=MODES, help="one way alone, in this process")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--passages", type=int, default=64)
    parser.add_argument("--passage-tokens", type=int, default=150)
    parser.add_argument("--query-tokens", type=int, default=18)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--store", type=float, default=4.0, help="GiB for kept contexts")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    if args.mode:
        print(json.dumps(measure(open_lm(args.shape, args.device), args.mode, args.adapter, args)))
        return
    # A process each, because peak memory is a process's.
    found = {}
    for mode in MODES:
        done = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--mode", mode], capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        found[mode] = json.loads(done.stdout.splitlines()[-1])
        print(mode, found[mode], file=sys.stderr)
    plain = found["plain"]["rows/s"]
    result = {
        "settings": {key: str(value) for key, value in vars(args).items() if key not in ("output", "mode")},
        "modes": found,
        "speed-up": {mode: round(found[mode]["rows/s"] / plain, 2) for mode in MODES[1:]},
        "made": provenance(threads=torch.get_num_threads()),
    }
    text = json.dumps(result, indent=2)
    print(text)
    if args.output:
        args.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
