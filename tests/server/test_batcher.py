"""One queue for all: batches are shared and fair, nobody waits for who has gone, and a fault stays with its request."""

import asyncio
import itertools
import threading
from contextlib import asynccontextmanager
from types import SimpleNamespace

import pytest

from qpeft.errors import QueryError
from qpeft.methods.query_likelihood import Config, build_scorer
from qpeft.server.batcher import MAX_CALLS, Batcher, Job, OverloadedError
from qpeft.server.metrics import Metrics
from qpeft.types import Passage, Query
from tiny_adapters import build
from tiny_server import QUERY, Watched


@pytest.fixture
def lm(make_lm):
    return Watched(make_lm("llama"))


def pairs(count, word="sky", query=QUERY):
    return [(Query("q", query), Passage("p", f"the {word} {'and the sea ' * (i % 7)}")) for i in range(count)]


def words(lm, batch):
    """Return the second word of each passage of a batch."""
    rows, _ = lm.batches[batch]
    return [lm.tokenizer.decode([row.context[row.passage[0] + 1]]) for row in rows]


@asynccontextmanager
async def batching(metrics=None, **options):
    batcher = Batcher(metrics or Metrics(), **{"batch_pairs": 8, "queue_pairs": 100, "max_wait": 0, **options})
    batcher.start()
    try:
        yield batcher
    finally:
        await batcher.close()


async def in_thread(function):
    return await asyncio.get_running_loop().run_in_executor(None, function)


async def held(lm, batcher, scorer, asked):
    """Return the task of a request whose first batch the model has begun, and does not end before it is opened."""
    lm.close()
    task = asyncio.create_task(batcher.score(scorer, asked))
    await in_thread(lm.wait_for_batch)
    return task


async def queued(batcher, count):
    while batcher.queued != count:
        await asyncio.sleep(0)


def test_requests_share_a_batch_and_get_their_own_scores(lm):
    scorer = build_scorer(Config(), lm)
    asked = [pairs(3, "sea"), pairs(1, "moon"), pairs(4, "lake")]
    alone = [scorer.score(each) for each in asked]
    lm.forget()

    async def run():
        async with batching() as batcher:
            return await asyncio.gather(*(batcher.score(scorer, each) for each in asked))

    found = asyncio.run(run())
    assert len(lm.batches) == 1
    for one, scores in zip(found, alone, strict=True):
        assert one.scores == pytest.approx(scores, abs=1e-5)
    assert sum(tokens for one in found for tokens in one.tokens) == sum(len(row) for row in lm.batches[0][0])


def test_a_lone_request_waits_for_company_but_not_for_ever(lm):
    scorer = build_scorer(Config(), lm)

    async def together():
        async with batching(max_wait=3600) as batcher:
            first = asyncio.create_task(batcher.score(scorer, pairs(5)))
            await queued(batcher, 5)
            for _ in range(20):
                await asyncio.sleep(0)
            assert not lm.batches
            await asyncio.gather(first, batcher.score(scorer, pairs(3)))
            assert len(lm.batches) == 1

    async def alone():
        async with batching(max_wait=0.001) as batcher:
            await batcher.score(scorer, pairs(2))

    asyncio.run(together())
    asyncio.run(alone())


def test_a_short_request_does_not_wait_for_the_end_of_a_long_one(lm):
    scorer = build_scorer(Config(), lm)

    async def run():
        done = []

        async def ask(name, count):
            await batcher.score(scorer, pairs(count, name))
            done.append(name)

        async with batching() as batcher:
            lm.close()
            long = [asyncio.create_task(ask(name, 40)) for name in ("sea", "lake")]
            await in_thread(lm.wait_for_batch)
            short = asyncio.create_task(ask("moon", 2))
            await queued(batcher, 74)
            lm.open()
            await asyncio.gather(*long, short)
        return done

    assert asyncio.run(run()) == ["moon", "sea", "lake"]
    assert "moon" in words(lm, 1) + words(lm, 2)
    assert {"sea", "lake"} == set(words(lm, 0))
    assert max(len(rows) for rows, _ in lm.batches) == 8


def test_a_cancelled_request_leaves_the_queue(lm):
    scorer = build_scorer(Config(), lm)

    async def run():
        async with batching() as batcher:
            first = await held(lm, batcher, scorer, pairs(8, "sea"))
            gone = asyncio.create_task(batcher.score(scorer, pairs(12, "king")))
            half = asyncio.create_task(batcher.score(scorer, pairs(1, "moon")))
            await queued(batcher, 13)
            gone.cancel()
            await queued(batcher, 1)
            lm.open()
            await asyncio.gather(first, half)
            assert gone.cancelled()

    asyncio.run(run())
    assert [words(lm, i) for i in range(len(lm.batches))] == [["sea"] * 8, ["moon"]]


def test_who_leaves_while_it_waits_for_company_leaves_no_batch(lm):
    scorer = build_scorer(Config(), lm)
    metrics = Metrics()

    async def run():
        async with batching(max_wait=0.05, metrics=metrics) as batcher:
            gone = asyncio.create_task(batcher.score(scorer, pairs(1, "king")))
            await queued(batcher, 1)
            gone.cancel()
            await asyncio.sleep(0.15)
            await batcher.score(scorer, pairs(2, "moon"))

    asyncio.run(run())
    assert [words(lm, i) for i in range(len(lm.batches))] == [["moon", "moon"]]
    assert "qpeft_batch_fill_count 1.0" in metrics.text().decode()


def test_a_request_cancelled_in_its_midst_is_scored_no_further(lm):
    scorer = build_scorer(Config(), lm)

    async def run():
        async with batching() as batcher:
            gone = await held(lm, batcher, scorer, pairs(40, "king"))
            gone.cancel()
            await queued(batcher, 0)
            lm.open()
            await batcher.score(scorer, pairs(1, "moon"))

    asyncio.run(run())
    assert [len(rows) for rows, _ in lm.batches] == [8, 1]


def test_a_full_queue_refuses_with_a_time(lm):
    scorer = build_scorer(Config(), lm)

    async def run():
        async with batching(queue_pairs=10) as batcher:
            first = await held(lm, batcher, scorer, pairs(8))
            large = asyncio.create_task(batcher.score(scorer, pairs(30)))  # an empty queue takes any
            await queued(batcher, 30)
            with pytest.raises(OverloadedError) as refused:
                await batcher.score(scorer, pairs(1))
            assert 1 <= refused.value.retry_after <= 60
            lm.open()
            await asyncio.gather(first, large)
            await batcher.score(scorer, pairs(1))

    asyncio.run(run())


def test_only_the_poisoned_request_fails(lm):
    scorer = build_scorer(Config(), lm)
    lm.poison = lm.tokenizer.convert_tokens_to_ids("lion")
    asked = [pairs(2, "sea"), pairs(2, "lion"), pairs(2, "lake"), pairs(2, "moon", " ")]

    async def run():
        async with batching() as batcher:
            return await asyncio.gather(*(batcher.score(scorer, each) for each in asked), return_exceptions=True)

    sea, lion, lake, empty = asyncio.run(run())
    assert isinstance(lion, RuntimeError)
    assert isinstance(empty, QueryError)
    assert sea.scores == pytest.approx(scorer.score(asked[0]), abs=1e-5)
    assert lake.scores == pytest.approx(scorer.score(asked[2]), abs=1e-5)


def test_whatever_fails_the_next_request_is_scored(lm, monkeypatch):
    scorer, other = build_scorer(Config(), lm), build_scorer(Config(), lm)
    without_kind = type("WithoutKind", (type(other),), {"kind": property(lambda self: {}["no head"])})
    other.__class__ = without_kind

    async def run():
        async with batching() as batcher:
            found = [
                await asyncio.gather(*(batcher.score(s, pairs(2)) for s in (other, scorer)), return_exceptions=True)
            ]
            with monkeypatch.context() as patch:
                patch.setattr("qpeft.server.batcher.score_chunks", lambda chunks: chunks[0].nothing)
                found.append(await asyncio.gather(batcher.score(scorer, pairs(2)), return_exceptions=True))
            return [*found, await batcher.score(scorer, pairs(2))]

    (failed, scored), (broken,), again = asyncio.run(asyncio.wait_for(run(), 60))
    assert isinstance(failed, KeyError)
    assert isinstance(broken, AttributeError)
    assert scored.scores == again.scores == pytest.approx(scorer.score(pairs(2)), abs=1e-5)


def test_adapters_and_layers_mix_in_one_batch(lm):
    adapters = [None, build("qpeft_a", lm, trained=True), build("qpeft_r", lm, trained=True)]
    adapters += [build("qpeft_c", lm, trained=True), build("lora", lm), build("qpeft_c", lm, trained=True, layer=1)]
    scorers = []
    for adapter in adapters:
        scorer = build_scorer(Config(template="qpeft"), lm)
        scorer.adapter = adapter
        scorers.append(scorer)
    asked = pairs(1, "sea")
    alone = [scorer.score(asked) for scorer in scorers]
    assert len({round(score, 3) for (score,) in alone}) >= 4
    lm.forget()

    async def run():
        async with batching() as batcher:
            return await asyncio.gather(*(batcher.score(scorer, asked) for scorer in scorers))

    found = asyncio.run(run())
    assert len(lm.batches) == 1
    for one, scores in zip(found, alone, strict=True):
        assert one.scores == pytest.approx(scores, abs=1e-4)


def test_calls_and_batches_take_turns(lm):
    scorer = build_scorer(Config(), lm)
    order = []

    async def run():
        async with batching() as batcher:
            scoring = await held(lm, batcher, scorer, pairs(24))
            calls = [asyncio.create_task(batcher.run(lambda: order.append(len(lm.batches)))) for _ in range(2)]
            await asyncio.sleep(0)
            lm.open()
            await asyncio.gather(scoring, *calls)

    asyncio.run(run())
    assert order[0] == 1 < order[1], "a batch stands between two calls; a second may slip in where the loop is slow"


def test_what_waits_at_the_end_is_cancelled(lm):
    scorer = build_scorer(Config(), lm)

    async def run():
        async with batching() as batcher:
            asked = await held(lm, batcher, scorer, pairs(20))
            closing = asyncio.create_task(batcher.close())
            await asyncio.sleep(0)
            lm.open()
            await closing
            with pytest.raises(asyncio.CancelledError):
                await asked

    asyncio.run(run())
    assert len(lm.batches) == 1


def test_the_words_that_tell_batches_apart_are_tokens(lm):
    assert lm.tokenizer.unk_token not in lm.tokenizer.tokenize("sea moon lake king lion")


def test_who_came_first_does_not_wait_for_who_came_last(lm):
    scorer = build_scorer(Config(), lm)

    async def run():
        loop = asyncio.get_running_loop()
        batcher = Batcher(Metrics(), batch_pairs=8, queue_pairs=100, max_wait=3600)
        for arrived in (loop.time() - 3601, loop.time()):
            batcher._waiting.append(Job(scorer, pairs(1), None, loop.create_future(), arrived))
        await asyncio.wait_for(batcher._company(), 5)

    asyncio.run(run())


def test_the_time_to_come_back_is_that_of_the_queue():
    batcher = Batcher(Metrics(), batch_pairs=8, queue_pairs=100, max_wait=0)
    batcher.queued = 50
    assert batcher._retry_after() == 1, "nothing was scored so far"
    for speed, seconds in ((1000.0, 1), (10.0, 5), (12.0, 5), (0.1, 60)):
        batcher._pairs_per_second = speed
        assert batcher._retry_after() == seconds


def test_the_speed_is_that_of_pairs(lm, monkeypatch):
    scorer = build_scorer(Config(), lm)
    clock = itertools.count(0, 2)  # each batch takes 2 s
    monkeypatch.setattr("qpeft.server.batcher.time", SimpleNamespace(perf_counter=lambda: next(clock)))

    async def run():
        async with batching() as batcher:
            await batcher.score(scorer, pairs(8))
            return batcher._pairs_per_second

    assert asyncio.run(run()) == 4.0


def test_few_calls_wait_but_those_that_must_not_be_lost(lm):
    scorer = build_scorer(Config(), lm)

    async def run():
        async with batching() as batcher:
            scoring = await held(lm, batcher, scorer, pairs(8))
            calls = [asyncio.create_task(batcher.run(lambda: None)) for _ in range(MAX_CALLS)]
            await asyncio.sleep(0)
            with pytest.raises(OverloadedError):
                await batcher.run(lambda: None)
            always = asyncio.create_task(batcher.run(lambda: "done", always=True))
            await asyncio.sleep(0)
            lm.open()
            await asyncio.gather(scoring, *calls)
            return await always, await batcher.run(lambda: "next")

    assert asyncio.run(asyncio.wait_for(run(), 60)) == ("done", "next")


@pytest.mark.parametrize(("every", "times"), [(-1.0, 2), (3600.0, 0)])
def test_free_memory_is_given_back_between_batches(lm, monkeypatch, every, times):
    scorer, threads = build_scorer(Config(), lm), []
    monkeypatch.setattr("qpeft.memory.EVERY", every)
    monkeypatch.setattr("qpeft.memory.give_back", lambda: threads.append(threading.current_thread().name))

    async def run():
        async with batching() as batcher:
            await batcher.score(scorer, pairs(9))
            await batcher.run(lambda: None)

    asyncio.run(run())
    assert len(threads) == times
    assert all(name.startswith("qpeft-model") for name in threads)
