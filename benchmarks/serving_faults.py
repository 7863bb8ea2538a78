"""What a server is put through besides load: faults, malformed bodies, and time. Each part says whether it passed."""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import time
from typing import Any

import hypothesis
import schemathesis

from server_process import POISON, ask, make_requests, serving


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
    options = ["--request-timeout", "600", *(["--adapters", args.adapters] if args.adapters else [])]
    async with serving(args, *options) as server:
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
