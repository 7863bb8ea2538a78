import random
import threading
import time

import pytest
import torch
from test_causal import ForgetfulModel, assert_close, rows_for

from qpeft.errors import ModelError
from qpeft.lm.causal import CausalLM
from qpeft.lm.side_by_side import MOST, SideBySide
from reference import naive_log_probs
from tiny_adapters import alike, with_store
from tiny_adapters import build as build_adapter
from tiny_adapters import rows_for as hinted_rows


@pytest.fixture
def three_threads():
    """Let torch have three threads, whatever the machine has."""
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(threads)


pytestmark = pytest.mark.usefixtures("three_threads", "no_rounding")


def threads_that_score(lm):
    """Return a set that fills with the names of the threads that run the model."""
    names = set()
    lm.model.register_forward_pre_hook(lambda *_: names.add(threading.current_thread().name))
    return names


def test_results_come_in_order_and_items_run_at_once():
    together = threading.Barrier(3, timeout=20)  # passes only if three are there

    def work(item):
        together.wait()
        time.sleep(0.01 * (3 - item % 3))
        return item * item, torch.get_num_threads()

    assert SideBySide().run(work, range(6)) == [(item * item, 1) for item in range(6)]


def test_threads_of_others_are_left_alone():
    beside, seen = SideBySide(), []
    beside.run(str, [1, 2])
    other = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    other.start()
    other.join()
    assert (torch.get_num_threads(), seen) == (3, [3])
    torch.set_num_threads(2 * MOST)
    assert beside.run(lambda _: torch.get_num_threads(), range(8)) == [2] * 8, "threads are shared out anew"


def test_an_error_is_raised_once_all_that_began_are_done():
    beside, running = SideBySide(), []

    def work(item):
        if item == 0:
            raise ZeroDivisionError
        running.append(item)
        time.sleep(0.05)
        running.remove(item)
        return item

    with pytest.raises(ZeroDivisionError):
        beside.run(work, range(50))
    assert running == []
    assert beside.run(str, [1]) == ["1"]


@pytest.mark.parametrize("batch_tokens", [1, 100])
def test_scores_equal_the_naive_reference(family, make_lm, batch_tokens):
    lm = alike(make_lm(family), batch_tokens=batch_tokens)
    rows, names = rows_for(lm), threads_that_score(lm)
    assert_close(lm.log_probs(rows), [naive_log_probs(lm.model, row) for row in rows])
    assert names - {"MainThread"}


def test_batches_are_of_one_size(make_lm):
    lm = alike(make_lm("llama"), batch_tokens=4096)
    rows, tokens = rows_for(lm)[:1] * 9, []
    lm.model.register_forward_pre_hook(
        lambda _, args, given: tokens.append(given["input_ids"].numel()), with_kwargs=True
    )
    lm.log_probs(rows)
    assert tokens == [3 * (len(rows[0]) - 1)] * 3


def test_each_context_is_encoded_once(make_lm):
    lm = with_store(make_lm("llama"), batch_tokens=1)
    rows = rows_for(lm) * 4
    contexts = {row.context for row in rows}
    assert_close(lm.log_probs(rows), [naive_log_probs(lm.model, row) for row in rows])
    assert (lm.store.misses, lm.store.hits) == (len(contexts), len(rows) - len(contexts))
    assert lm.store.bytes_kept == sum(packed.nbytes for packed in lm.store._kept.values())
    assert not lm.store._begun


def test_contexts_that_are_not_kept_are_shared_out_evenly(make_lm):
    """As many batches for each of the three threads; fewer and larger ones would leave threads waiting."""
    lm = with_store(make_lm("llama"), capacity=0)
    seen = []
    lm.model.register_forward_pre_hook(lambda _, args, kw: seen.append(len(kw["input_ids"])), with_kwargs=True)
    contexts = [(1, *range(3, 32), *random.Random(i).choices(range(3, 60), k=120)) for i in range(48)]
    lm.encode_all(contexts)
    assert seen == [8] * 6


def test_an_error_of_encoding_reaches_all_that_wait_for_it(make_lm, monkeypatch):
    lm = with_store(make_lm("llama"), batch_tokens=1)
    rows = rows_for(lm)[:1] * 3

    def fail(*_):
        time.sleep(0.05)
        raise ZeroDivisionError

    monkeypatch.setattr(lm, "_encode", fail)
    with pytest.raises(ZeroDivisionError):
        lm.log_probs(rows)
    monkeypatch.undo()
    assert_close(lm.log_probs(rows), [naive_log_probs(lm.model, row) for row in rows])


@pytest.mark.parametrize("name", ["qpeft_a", "qpeft_c", "lora"])
def test_adapters_take_part(make_lm, name):
    lm = alike(make_lm("llama"), batch_tokens=1)
    adapter = build_adapter(name, lm, trained=True)
    rows, names = hinted_rows(lm, adapter), threads_that_score(lm)
    mixed = [adapter if place % 3 else None for place in range(len(rows))]
    found = lm.log_probs(rows, adapters=mixed)
    torch.set_num_threads(1)
    for one, other in zip(found, lm.log_probs(rows, adapters=mixed), strict=True):
        torch.testing.assert_close(one.target, other.target, atol=1e-5, rtol=0)
    assert names - {"MainThread"}


def test_experts_that_lora_changes_are_for_one_thread_at_a_time(make_lm):
    lm = alike(make_lm("mixtral"), batch_tokens=1)
    adapter = build_adapter("lora", lm, trained=True)
    names = threads_that_score(lm)
    lm.log_probs(hinted_rows(lm, adapter), adapters=adapter)
    assert names == {"MainThread"}


def test_what_does_not_fit_beside_others_is_tried_alone(make_lm):
    plain = make_lm("llama")
    rows = rows_for(plain)
    model = ForgetfulModel(plain.model, most=2)
    lm = CausalLM(model, plain.tokenizer, name="small machine", max_length=128, batch_tokens=4096)
    assert_close(lm.log_probs(rows), [naive_log_probs(plain.model, row) for row in rows])
    assert model.refused > 0
    model.most = 0
    with pytest.raises(ModelError, match="do not fit in the memory"):
        lm.log_probs(rows)


def test_a_context_is_the_same_to_the_bit_whoever_asks(make_lm):
    lm, other = (with_store(make_lm("qwen3", dtype=torch.bfloat16), batch_tokens=1) for _ in range(2))
    rows = rows_for(lm)
    lm.log_probs(rows)
    with torch.no_grad():
        other.score(rows)  # as training does, in its own thread
    for row in rows:
        key = lm.key(row.context)
        assert torch.equal(lm.store._kept[key].numbers, other.store._kept[key].numbers)
