"""A real server under load, under faults, under malformed bodies, and for a long time.

    python benchmarks/serving.py --output benchmarks/results/serving-tiny-lm-cpu.json           # load and faults
    python benchmarks/serving.py --clients 16 --requests 10 --documents 20                      # the same, smaller
    python benchmarks/serving.py --fuzz 10000 --clients 0                                       # malformed bodies alone
    python benchmarks/serving.py --soak 60 --clients 0                                          # minutes

Load: every client sends its requests one after another over loopback; queries and documents are those of `mini`, and so
are different for every request. Every score is compared with that of the offline scorer, which also gives the
throughput that the server's is a ratio of; it runs right afterwards, on the same pairs, with the same number of threads
and with batches that are no smaller than the server's. Faults: clients that go away, a document that makes the model
fail, SIGTERM. Fuzzing: bodies that break the OpenAPI document, and bodies with broken bytes. Soak: load, refusals and
adapters that come and go, while the server's memory is watched.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import psutil
import torch

from qpeft.data.collection import open_collection
from qpeft.lm import CausalLM
from qpeft.loading import load_lm
from qpeft.methods.query_likelihood import Config, build_scorer
from qpeft.model_config import ModelConfig
from qpeft.provenance import provenance
from qpeft.types import Passage, Query

POISON = "zyzzyva"
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.06, "float16": 0.02}
"""Nats by which a score may depend on its batch; between two passages of mini lies far more."""


@dataclass
class Serving:
    """A server process, and a client of it."""

    process: asyncio.subprocess.Process
    url: str
    client: httpx2.AsyncClient

    async def metric(self, name: str) -> float:
        """Return a metric's value."""
        text = (await self.client.get("/metrics")).text
        return float(re.search(rf"^{re.escape(name)} (\S+)", text, re.M)[1])

    def resident(self) -> float:
        """Return the process's memory in MiB."""
        return psutil.Process(self.process.pid).memory_info().rss / 2**20


@asynccontextmanager
async def serving(args: argparse.Namespace, *options: str, poisoned: bool = False) -> AsyncIterator[Serving]:
    start = [__file__, "--serve-poisoned"] if poisoned else ["-m", "qpeft", "serve"]
    command = [sys.executable, *start, "--port", "0", "--model", args.model, "--device", args.device]
    process = await asyncio.create_subprocess_exec(
        *command, "--dtype", args.dtype, *options, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    try:
        line = (await process.stdout.readline()).decode()
        if not line.startswith("http"):
            sys.exit(f"the server did not start: {' '.join(command)}")
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
        url = line.split()[0]
        async with httpx2.AsyncClient(base_url=url, timeout=600, limits=limits, trust_env=False) as client:
            yield Serving(process, url, client)
    finally:
        if process.returncode is None:
            process.terminate()
            await process.wait()


def make_requests(count: int, documents: int) -> list[dict[str, Any]]:
    """Return bodies, each with a query and documents of its own."""
    mini = open_collection("mini")
    queries = [query.text for split in ("train", "dev", "test") for query in mini.queries(split).values()]
    passages = list(mini.passages.values())
    rng = random.Random(0)
    bodies = []
    for i in range(count):
        chosen = [rng.choice(passages) for _ in range(documents)]
        texts = [{"title": each.title, "text": each.text} for each in chosen]
        query = queries[i % len(queries)] + (f" {i // len(queries)}" if i >= len(queries) else "")
        bodies.append({"query": query, "documents": texts, "raw_scores": True, "return_documents": False})
    return bodies


async def ask(server: Serving, body: dict[str, Any]) -> dict[int, float]:
    response = await server.client.post("/v1/rerank", json=body)
    response.raise_for_status()
    return {result["index"]: result["relevance_score"] for result in response.json()["results"]}


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
        started = time.perf_counter()
        await asyncio.gather(*(client(number) for number in range(args.clients)))
        seconds = time.perf_counter() - started
        fill, batches, tokens = [await server.metric(n) - b for n, b in zip(names, before, strict=True)]
    latencies.sort()
    pairs = sum(len(body["documents"]) for body in bodies)
    facts = {
        "dtype": dtype,
        "requests": len(bodies),
        "pairs": pairs,
        "seconds": round(seconds, 2),
        "pairs/s": round(pairs / seconds, 1),
        "tokens/s": round(tokens / seconds),
        "batches": int(batches),
        "batch fill": round(fill / batches, 3),
        "latency p50 s": round(latencies[len(latencies) // 2], 3),
        "latency p99 s": round(latencies[min(len(latencies) - 1, int(0.99 * len(latencies)))], 3),
    }
    return facts, answers


def offline(
    args: argparse.Namespace, bodies: list[dict[str, Any]], dtype: Any, batch: int = 64
) -> tuple[float, list[list[float]]]:
    """Return the seconds that the offline scorer takes, and its scores, request by request."""
    scorer = build_scorer(Config(), load_lm(ModelConfig(args.model, device=args.device, dtype=dtype)))
    pairs = [
        [(Query("q", body["query"]), Passage("p", each["text"], each["title"])) for each in body["documents"]]
        for body in bodies
    ]
    together = -(-batch // max(1, len(pairs[0])))
    scorer.score(pairs[0])
    scores: list[list[float]] = []
    started = time.perf_counter()
    for first in range(0, len(pairs), together):
        some = pairs[first : first + together]
        flat = iter(scorer.score([pair for each in some for pair in each]))
        scores += [[next(flat) for _ in each] for each in some]
    return time.perf_counter() - started, scores


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
    seconds, scores = offline(args, bodies, facts["dtype"])
    found = facts | compare(answers, scores, facts["dtype"])
    found["offline pairs/s"] = round(facts["pairs"] / seconds, 1)
    found["ratio to offline"] = round(found["pairs/s"] / found["offline pairs/s"], 3)
    found["passed"] = (
        not found["errors"]
        and not found["lost or swapped"]
        and found["ratio to offline"] >= 0.8
        and found["batch fill"] > 0.6
    )
    return found


async def disconnects(args: argparse.Namespace) -> dict[str, Any]:
    """Every other client goes away in the midst of its request; the others must get their answers."""
    bodies = make_requests(40, args.documents)
    async with serving(args) as server:

        async def leave(body: dict[str, Any]) -> str:
            try:
                await asyncio.wait_for(ask(server, body), random.Random(body["query"]).uniform(0.001, 0.2))
            except TimeoutError:
                return "left"
            return "answered in time"

        found = await asyncio.gather(
            *(ask(server, body) if i % 2 else leave(body) for i, body in enumerate(bodies)), return_exceptions=True
        )
        stayed = [each for each in found[1::2] if isinstance(each, dict) and len(each) == args.documents]
        left_over = await server.metric("qpeft_queued_pairs")
        alone = await ask(server, bodies[1])
    same = all(abs(alone[i] - found[1][i]) < 0.1 for i in alone)
    facts = {"left": found[0::2].count("left"), "stayed": 20, "answered": len(stayed), "queued afterwards": left_over}
    return {**facts, "passed": len(stayed) == 20 and left_over == 0 and same}


async def poisoned(args: argparse.Namespace) -> dict[str, Any]:
    """Every tenth request makes the model fail; only those may."""
    bodies = make_requests(40, 5)
    for body in bodies[::10]:
        body["documents"][2]["text"] += f" {POISON}"
    async with serving(args, poisoned=True) as server:
        responses = await asyncio.gather(*(server.client.post("/v1/rerank", json=body) for body in bodies))
    statuses = [response.status_code for response in responses]
    leaked = any("Traceback" in response.text or POISON in response.text for response in responses)
    expected = [500 if i % 10 == 0 else 200 for i in range(40)]
    return {
        "failed": statuses.count(500),
        "answered": statuses.count(200),
        "passed": statuses == expected and not leaked,
    }


async def terminated(args: argparse.Namespace) -> dict[str, Any]:
    """SIGTERM under load: what was accepted is answered, what comes later gets 503, and the server ends with 0."""
    bodies = make_requests(24, args.documents)
    async with serving(args) as server:
        accepted = [asyncio.ensure_future(ask(server, body)) for body in bodies]
        total = sum(len(body["documents"]) for body in bodies)
        while await server.metric("qpeft_queued_pairs") < total - 5 * 64:
            await asyncio.sleep(0.005)
        server.process.send_signal(signal.SIGTERM)
        while (await server.client.get("/ready")).status_code != 503:
            await asyncio.sleep(0.005)
        late = (await server.client.post("/v1/rerank", json=bodies[0])).status_code
        answers = await asyncio.gather(*accepted, return_exceptions=True)
        code = await server.process.wait()
    answered = sum(isinstance(answer, dict) and len(answer) == args.documents for answer in answers)
    facts = {"accepted": len(bodies), "answered": answered, "a late request got": late, "exit code": code}
    return {**facts, "passed": answered == len(bodies) and late == 503 and code == 0}


async def fuzz(args: argparse.Namespace) -> dict[str, Any]:
    """Half the bodies break the OpenAPI document, half are good ones with broken bytes; none may give a 500."""
    async with serving(args) as server:
        counts = await asyncio.to_thread(broken_documents, server.url, args.fuzz // 2)
        rng = random.Random(0)
        good = [json.dumps(body).encode() for body in make_requests(50, 3)]
        routes = ("/v1/rerank", "/v2/rerank", "/rerank", "/score", "/v1/rerank/batch")
        for _ in range(args.fuzz - args.fuzz // 2):
            body = bytearray(rng.choice(good))
            for _ in range(rng.randint(1, 8)):
                place = rng.randrange(len(body))
                body[place : place + rng.randint(0, 3)] = rng.randbytes(rng.randint(0, 3))
            headers = {"Content-Type": "application/json"}
            response = await server.client.post(rng.choice(routes), content=bytes(body), headers=headers)
            counts[response.status_code] = counts.get(response.status_code, 0) + 1
        alive = (await server.client.get("/ready")).status_code == 200
    bad = sum(count for status, count in counts.items() if status >= 500)
    statuses = {str(status): count for status, count in sorted(counts.items())}
    return {"bodies": sum(counts.values()), "statuses": statuses, "passed": not bad and alive}


def broken_documents(url: str, count: int) -> dict[int, int]:
    """Send bodies that the OpenAPI document denies, and return how often each status came."""
    import hypothesis
    import schemathesis

    counts: dict[int, int] = {}
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    operations = [operation for operation in operations if operation.body]
    for operation in operations:

        @hypothesis.given(case=operation.as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE))
        @hypothesis.settings(
            max_examples=-(-count // len(operations)),
            deadline=None,
            database=None,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        def send(case: Any) -> None:
            status = case.call(base_url=url).status_code
            counts[status] = counts.get(status, 0) + 1

        send()
    return counts


async def soak(args: argparse.Namespace) -> dict[str, Any]:
    """Send load, refusals and adapters that come and go; memory must level off."""
    ends = time.monotonic() + 60 * args.soak
    memory: list[float] = []
    done = 0
    async with serving(args, "--adapters", args.adapters) if args.adapters else serving(args) as server:
        names = [card["id"] for card in (await server.client.get("/v1/models")).json()["data"]]

        async def client(number: int) -> None:
            nonlocal done
            rng = random.Random(number)
            while time.monotonic() < ends:
                words = [f"{rng.getrandbits(40):x}" for _ in range(40)]
                documents = [" ".join(rng.choices(words, k=rng.randint(1, 300))) for _ in range(rng.randint(1, 40))]
                body = {"query": " ".join(words[:8]), "documents": documents, "model": rng.choice(names)}
                if rng.random() < 0.1:
                    body[rng.choice(("query", "documents", "top_n"))] = []
                response = await server.client.post("/v1/rerank", json=body)
                assert response.status_code in (200, 404, 422), response.text
                done += 1

        async def adapters() -> None:
            while time.monotonic() < ends:
                for name in names[1:]:
                    adapter = name.partition(":")[2]
                    await server.client.delete(f"/v1/adapters/{adapter}")
                    await server.client.post(f"/v1/adapters/{adapter}")
                    await asyncio.sleep(1)
                if not names[1:]:
                    await asyncio.sleep(1)

        async def watch() -> None:
            while time.monotonic() < ends:
                memory.append(server.resident())
                await asyncio.sleep(5)

        await asyncio.gather(adapters(), watch(), *(client(number) for number in range(8)))
    fifth = max(1, len(memory) // 5)
    early, late = sum(memory[fifth : 2 * fifth]) / fifth, sum(memory[-fifth:]) / fifth
    facts = {"minutes": args.soak, "requests": done, "RSS MiB": [round(each) for each in memory[:: max(1, fifth // 2)]]}
    return {**facts, "RSS second fifth": round(early), "RSS last fifth": round(late), "passed": late < 1.03 * early}


class Poisoned(CausalLM):
    """A model that fails on one word."""

    def log_probs(self, rows: Any, **options: Any) -> Any:
        """Fail where a row has the word."""
        word = tuple(self.tokenizer(POISON, add_special_tokens=False)["input_ids"])
        for row in rows:
            if any(row.context[i : i + len(word)] == word for i in range(len(row.context))):
                raise RuntimeError(f"{POISON} cannot be read")
        return super().log_probs(rows, **options)


def serve_poisoned(arguments: list[str]) -> None:
    """Serve a model that fails on one word; options as of `qpeft serve`."""
    from qpeft.cli import parse
    from qpeft.commands.serve import _announce, configs
    from qpeft.server.app import create_app
    from qpeft.server.logs import on_stderr
    from qpeft.server.run import serve

    settings, model = parse("serve", "", configs([]), arguments)

    def open_poisoned() -> CausalLM:
        lm: Any = load_lm(model)
        lm.__class__ = Poisoned
        return lm

    with on_stderr():
        serve(create_app(settings, open_poisoned), settings, _announce)


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
    if torch.cuda.is_available():
        result["gpu"] = torch.cuda.get_device_name()
    text = json.dumps(result, indent=2)
    print(text)
    if args.output:
        args.output.write_text(text + "\n", encoding="utf-8")
    sys.exit(not result["passed"])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve-poisoned"]:
        serve_poisoned(sys.argv[2:])
    else:
        main()
