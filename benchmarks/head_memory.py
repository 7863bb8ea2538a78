"""Peak memory of scoring with a vocabulary of 128,256: our path beside logits at all positions.

    python benchmarks/head_memory.py --output benchmarks/results/head_memory.json

A small random body under a large head, so that what is measured is the head. Each measurement is a process of its own;
its peak is counted from what model and rows take before scoring. Rows of 200 tokens have 20 scored ones. Where there
is a GPU, its memory is measured too. `--quick` takes few rows.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import tables
from memory import peak_mib, reset_peak, resident_mib
from naive import padded_scores
from qpeft.lm.causal import CausalLM
from qpeft.template import Row
from rounds import made, set_up
from shapes import SHAPES, open_lm
from training import make_rows

SHAPE = "llama-128k-head"
PASSAGE_TOKENS, QUERY_TOKENS = 175, 20
OURS = "qpeft"
WAYS = (OURS, "logits at all positions, bf16", "logits at all positions, fp32")
BATCHES = (1_024, 4_096, 65_536)
"""Tokens in a batch: our default for one CPU thread, for four, and for GPUs."""
REPEATS = 2
"""Times that all rows are scored, after a first time that is not counted; the largest peak counts."""
RETURNED = {"MALLOC_MMAP_THRESHOLD_": str(16 * 2**20)}
"""Lets the C library give large freed tensors back at once, so that the peak is what was alive, without gaps."""
FULL_LIMIT = 4_096
"""Tokens in a batch for logits at all positions; these take about five GiB, more would not fit on a small machine."""


def rows_of(count: int) -> list[Row]:
    """Return random rows of 200 tokens."""
    return make_rows(count, count, PASSAGE_TOKENS, QUERY_TOKENS)


def at_all_positions(lm: CausalLM, rows: Sequence[Row], batch_tokens: int, dtype: torch.dtype) -> None:
    """Score rows the plain way: logits everywhere, a log-softmax of all of them."""
    count = max(1, batch_tokens // len(rows[0]))
    for start in range(0, len(rows), count):
        some = rows[start : start + count]
        padded_scores(lm.model, [[*row.context, *row.target] for row in some], [sum(row.scored) for row in some], dtype)


@torch.inference_mode()
def measure(way: str, device: str, count: int, batch_tokens: int) -> dict[str, Any]:
    """Return the peak of scoring above what was in memory before, in this process."""
    lm = open_lm(SHAPE, device)
    lm = CausalLM(lm.model, lm.tokenizer, name=SHAPE, max_length=512, batch_tokens=batch_tokens)
    rows = rows_of(count)
    dtype = torch.float32 if way.endswith("fp32") else torch.bfloat16
    score: Callable[[Sequence[Row]], Any] = lm.log_probs
    if way != OURS:
        score = lambda some: at_all_positions(lm, some, batch_tokens, dtype)  # noqa: E731
    peaks = []
    for _ in range(1 + REPEATS):
        if device == "cpu":
            reset_peak()
            before = resident_mib()
            score(rows)
            peaks.append(peak_mib() - before)
        else:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            score(rows)
            peaks.append((torch.cuda.max_memory_allocated() - before) / 2**20)
    return {
        "way": way,
        "device": device,
        "rows": count,
        "batch tokens": batch_tokens,
        "scored": sum(sum(row.scored) for row in rows),
        "peak MiB": round(max(peaks[1:]), 1),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--quick", action="store_true", help="eight rows")
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--one", nargs=4, metavar=("WAY", "DEVICE", "ROWS", "TOKENS"), help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args(arguments)
    set_up(args.threads)
    if args.one:
        way, device, count, tokens = args.one
        print(json.dumps(measure(way, device, int(count), int(tokens))))
        return
    threads = [] if args.threads is None else ["--threads", str(args.threads)]
    count = 8 if args.quick else args.rows
    points = []
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        for way in WAYS:
            for tokens in BATCHES:
                if way != OURS and tokens > FULL_LIMIT and device == "cpu":
                    continue
                command = [sys.executable, __file__, *threads, "--one", way, device, str(count), str(tokens)]
                done = subprocess.run(command, capture_output=True, text=True, env=os.environ | RETURNED)
                if done.returncode:
                    sys.exit(done.stderr)
                points.append(json.loads(done.stdout.splitlines()[-1]))
                print(points[-1], file=sys.stderr)
    result = {
        "kind": "head_memory",
        "vocabulary": SHAPES[SHAPE]["vocab_size"],
        "points": points,
        "made": made(),
    }
    print(tables.render(result))
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
