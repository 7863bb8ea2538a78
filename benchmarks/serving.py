"""A real server under load, under faults, under malformed bodies, and for a long time.

    python benchmarks/serving.py --output benchmarks/results/serving-tiny-lm-cpu.json           # load and faults
    python benchmarks/serving.py --clients 16 --requests 10 --documents 20                      # the same, smaller
    python benchmarks/serving.py --fuzz 10000 --clients 0                                       # malformed bodies alone
    python benchmarks/serving.py --soak 60 --clients 0                                          # minutes

Load: every client sends its requests one after another over loopback; queries and documents are those of `mini`, and so
are different for every request. Every score is compared with that of the offline scorer, which also gives the
throughput that the server's is a ratio of; it runs right afterwards, on the same pairs, with the same number of threads
and with batches that are no smaller than the server's. Processor time says what the server adds where the cores are
shared with other work, clients included. Faults: clients that go away, a document that makes the model
fail, SIGTERM. Fuzzing: bodies that break the OpenAPI document, and bodies with broken bytes. Soak: load, refusals and
adapters that come and go, while the server's memory is watched.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import httpx2
import torch

from qpeft.loading import load_lm
from qpeft.methods.query_likelihood import Config, build_scorer
from qpeft.model_config import ModelConfig
from qpeft.provenance import provenance
from qpeft.types import Passage, Query
from server_process import ask, make_requests, serving
from serving_faults import disconnects, fuzz, poisoned, soak, terminated

TOLERANCE = {"float32": 1e-3, "bfloat16": 0.06, "float16": 0.02}
"""Nats by which a score may depend on its batch; between two passages of mini lies far more."""


async def under_load(args: argparse.Namespace, bodies: list[dict[str, Any]]) -> tuple[dict[str, Any], list[Any]]:
    """Return what was measured, and the scores of every request (or what went wrong)."""
    answers: list[Any] = [None] * len(bodies)
    latencies: list[float] = []

    async def client(number: int) -> None:
        for i in range(number, len(bodies), args.clients):
            started = time.perf_counter()
            try:
                answers[i] = await ask(server, bodies[i])
            except httpx2.HTTPError as error:
                answers[i] = f"{type(error).__name__}: {error}"
            latencies.append(time.perf_counter() - started)

    async with serving(args, "--request-timeout", "600") as server:
        await asyncio.gather(*(ask(server, body) for body in bodies[: args.clients]))
        dtype = (await server.client.get("/info")).json()["model_dtype"]
        names = ("qpeft_batch_fill_sum", "qpeft_batch_fill_count", "qpeft_tokens_total")
        before = [await server.metric(name) for name in names]
        started, busy = time.perf_counter(), server.busy()
        await asyncio.gather(*(client(number) for number in range(args.clients)))
        seconds, busy = time.perf_counter() - started, server.busy() - busy
        fill, batches, tokens = [await server.metric(n) - b for n, b in zip(names, before, strict=True)]
    latencies.sort()
    pairs = sum(len(body["documents"]) for body in bodies)
    facts = {
        "dtype": dtype,
        "requests": len(bodies),
        "pairs": pairs,
        "seconds": round(seconds, 2),
        "pairs/s": round(pairs / seconds, 1),
        "processor ms/pair": round(1000 * busy / pairs, 3),
        "tokens/s": round(tokens / seconds),
        "batches": int(batches),
        "batch fill": round(fill / batches, 3),
        "latency p50 s": round(latencies[len(latencies) // 2], 3),
        "latency p99 s": round(latencies[min(len(latencies) - 1, int(0.99 * len(latencies)))], 3),
    }
    return facts, answers


def offline(
    args: argparse.Namespace, bodies: list[dict[str, Any]], dtype: Any, batch: int = 128
) -> tuple[dict[str, float], list[list[float]]]:
    """Return how fast the offline scorer is, and its scores, request by request."""
    scorer = build_scorer(Config(), load_lm(ModelConfig(args.model, device=args.device, dtype=dtype)))
    pairs = [
        [(Query("q", body["query"]), Passage("p", each["text"], each["title"])) for each in body["documents"]]
        for body in bodies
    ]
    together = -(-batch // max(1, len(pairs[0])))
    scorer.score(pairs[0])
    scores: list[list[float]] = []
    started, busy = time.perf_counter(), time.process_time()
    for first in range(0, len(pairs), together):
        some = pairs[first : first + together]
        flat = iter(scorer.score([pair for each in some for pair in each]))
        scores += [[next(flat) for _ in each] for each in some]
    seconds, busy = time.perf_counter() - started, time.process_time() - busy
    count = sum(map(len, pairs))
    return {
        "offline pairs/s": round(count / seconds, 1),
        "offline processor ms/pair": round(1000 * busy / count, 3),
    }, scores


def compare(answers: list[Any], scores: list[list[float]], dtype: str) -> dict[str, Any]:
    """Return how many requests failed, lack an answer, or have one that is not theirs."""
    errors = [answer for answer in answers if not isinstance(answer, dict)]
    wrong, worst = 0, 0.0
    for answer, wanted in zip(answers, scores, strict=True):
        if isinstance(answer, dict):
            whole = sorted(answer) == list(range(len(wanted)))
            gap = max(abs(answer[i] - score) for i, score in enumerate(wanted)) if whole else float("inf")
            worst = max(worst, gap)
            wrong += gap > TOLERANCE[dtype]
    return {
        "errors": len(errors),
        "first error": errors[0] if errors else None,
        "lost or swapped": wrong,
        "largest difference, nats": worst,
        "tolerance, nats": TOLERANCE[dtype],
    }


async def load(args: argparse.Namespace) -> dict[str, Any]:
    bodies = make_requests(args.clients * args.requests, args.documents)
    facts, answers = await under_load(args, bodies)
    alone, scores = offline(args, bodies, facts["dtype"])
    found = facts | compare(answers, scores, facts["dtype"]) | alone
    found["ratio to offline"] = round(found["pairs/s"] / found["offline pairs/s"], 3)
    found["passed"] = (
        not found["errors"]
        and not found["lost or swapped"]
        and found["ratio to offline"] >= 0.8
        and found["batch fill"] > 0.6
    )
    return found


async def run(args: argparse.Namespace) -> dict[str, Any]:
    parts = []
    if args.clients:
        parts += [("load", load), ("clients that leave", disconnects), ("poison", poisoned), ("SIGTERM", terminated)]
    if args.fuzz:
        parts.append(("malformed bodies", fuzz))
    if args.soak:
        parts.append(("soak", soak))
    found = {}
    for name, part in parts:
        found[name] = await part(args)
        print(name, json.dumps(found[name]), file=sys.stderr, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=64, help="0: neither load nor faults")
    parser.add_argument("--requests", type=int, default=50, help="of each client")
    parser.add_argument("--documents", type=int, default=20, help="of each request")
    parser.add_argument("--fuzz", type=int, default=0, help="malformed bodies")
    parser.add_argument("--soak", type=float, default=0, help="minutes")
    parser.add_argument("--model", default="tiny-lm")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto", choices=["auto", *TOLERANCE])
    parser.add_argument("--adapters", help="folder of adapters, for the soak")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    found = asyncio.run(run(args))
    result = {
        "settings": {key: str(value) for key, value in vars(args).items() if key != "output"},
        **found,
        "passed": all(part["passed"] for part in found.values()),
        "load average": [round(each, 2) for each in os.getloadavg()],
        "made": provenance(threads=torch.get_num_threads()),
    }
    text = json.dumps(result, indent=2)
    print(text)
    if args.output:
        args.output.write_text(text + "\n", encoding="utf-8")
    sys.exit(not result["passed"])


if __name__ == "__main__":
    main()
