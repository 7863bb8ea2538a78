"""A server in a process of its own, and requests for it; also one whose model fails on a word.

python benchmarks/server_process.py [options of qpeft serve]      # serves the model that fails
"""

from __future__ import annotations

import argparse
import asyncio
import random
import re
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx2
import psutil

from qpeft.cli import read
from qpeft.data.collection import open_collection
from qpeft.lm.causal import CausalLM
from qpeft.loading import load_lm
from qpeft.server import run
from qpeft.server.app import create_app
from qpeft.server.logs import on_stderr

POISON = "zyzzyva"


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

    def busy(self) -> float:
        """Return the seconds of processor time that the process has had."""
        times = psutil.Process(self.process.pid).cpu_times()
        return times.user + times.system

    def resident(self) -> float:
        """Return the process's memory in MiB."""
        return psutil.Process(self.process.pid).memory_info().rss / 2**20


@asynccontextmanager
async def serving(args: argparse.Namespace, *options: str, poisoned: bool = False) -> AsyncIterator[Serving]:
    start = [__file__] if poisoned else ["-m", "qpeft", "serve"]
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


class Poisoned(CausalLM):
    """A model that fails on one word."""

    def log_probs(self, rows: Any, **options: Any) -> Any:
        """Fail where a row has the word."""
        word = tuple(self.tokenizer(POISON, add_special_tokens=False)["input_ids"])
        for row in rows:
            if any(row.context[i : i + len(word)] == word for i in range(len(row.context))):
                raise RuntimeError(f"{POISON} cannot be read")
        return super().log_probs(rows, **options)


def main() -> None:
    """Serve a model that fails on one word."""
    _, (settings, model) = read(["serve", *sys.argv[1:]])

    def open_poisoned() -> CausalLM:
        lm: Any = load_lm(model)
        lm.__class__ = Poisoned
        return lm

    with on_stderr():
        run.serve(create_app(settings, open_poisoned), settings, lambda url, models: print(url, flush=True))


if __name__ == "__main__":
    main()
