import random
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import save_file
from test_causal import PASSAGES, QUERY, ForgetfulModel, rows_for
from transformers import MambaConfig, MambaForCausalLM

from qpeft.errors import InputError, ModelError
from qpeft.lm import context_store, encoding
from qpeft.lm.causal import CausalLM
from qpeft.lm.context_store import ContextStore, Encoded, Packed
from qpeft.template import Prompt, load_template
from qpeft.types import Query

ENOUGH = 1 << 30


def with_store(lm, capacity=ENOUGH, folder=None, batch_tokens=4096, storage="exact"):
    return CausalLM(
        lm.model,
        lm.tokenizer,
        name=lm.name,
        max_length=lm.max_length,
        batch_tokens=batch_tokens,
        store=ContextStore(capacity, folder, storage),
    )


def assert_same(values, references, *, exactly=False):
    for value, reference in zip(values, references, strict=True):
        tolerance = 0 if exactly else 1e-4
        torch.testing.assert_close(value.target, reference.target, atol=tolerance, rtol=0)


def test_scores_over_encoded_contexts_equal_plain_ones(family, make_lm):
    lm = make_lm(family)
    stored = with_store(lm)
    rows = rows_for(lm)
    assert max(len(row.context) for row in rows) > 12, "longer than the sliding window, so that it bites"
    for _ in range(2):
        assert_same(stored.log_probs(rows), lm.log_probs(rows))
    assert (stored.store.misses, stored.store.hits) == (len(PASSAGES), len(PASSAGES) * 3)


@pytest.mark.parametrize("layer", [None, 1])
def test_contexts_that_are_not_kept_are_encoded_together(family, make_lm, layer):
    lm = with_store(make_lm(family), capacity=0)
    contexts = [row.context for row in rows_for(lm, queries=[QUERY])]
    assert len(set(map(len, contexts))) > 1, "so that some are padded"
    alone = [lm.encode(ids, layer) for ids in contexts]
    calls = []
    with lm.model.register_forward_pre_hook(lambda *call: calls.append(call)):
        together = lm.encode_all([*contexts, *contexts[:2]], layer)
    assert 1 <= len(calls) < len(contexts)
    for one, other in zip(together, [*alone, *alone[:2]], strict=True):
        torch.testing.assert_close(one.cache, other.cache, atol=1e-4, rtol=0)
        assert (one.states is None) == (layer is None)
        if layer is not None:
            torch.testing.assert_close(one.states, other.states, atol=1e-4, rtol=0)


def test_of_many_contexts_only_those_are_encoded_that_are_not_there(make_lm, tmp_path):
    """Where nobody needs the same bits, as on a GPU, in batches of any shape."""
    lm = with_store(make_lm("llama"), folder=tmp_path)
    lm.repeatable = False
    contexts = [row.context for row in rows_for(lm, queries=[QUERY])]
    lm.encode_all(contexts[:2])
    seen = []
    lm.model.register_forward_pre_hook(lambda _, args, kw: seen.append(len(kw["input_ids"])), with_kwargs=True)
    encoded = lm.encode_all(contexts)
    assert sum(seen) == len(contexts) - 2
    assert all(torch.equal(one.cache, lm.encode(ids).cache) for one, ids in zip(encoded, contexts, strict=True))
    assert (lm.store.misses, sum(seen)) == (len(contexts), len(contexts) - 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_of_a_context_do_not_depend_on_its_company(family, make_lm, dtype):
    lm = make_lm(family, dtype=dtype)
    contexts = [(1, *range(3, n)) for n in (4, 7, 9, 12, 15, 16, 17, 20, 25, 31, 32, 33)]
    alone = [with_store(lm).encode(ids) for ids in contexts]
    shuffled = random.Random(0).sample(range(len(contexts)), len(contexts))
    calls, other = [], with_store(lm)
    with lm.model.register_forward_pre_hook(lambda *call: calls.append(call)):
        together = other.encode_all([contexts[i] for i in shuffled])
    assert (len(calls) == len(contexts)) == (family == "mixtral"), "experts are sent the tokens of all rows"
    for i, found in zip(shuffled, together, strict=True):
        assert torch.equal(found.cache, alone[i].cache)


@pytest.mark.parametrize("share", [1, 2, 4, 10])
def test_contexts_are_encoded_before_rows_are_scored(make_lm, share):
    """Each once, and never more at a time than half of the store holds; whatever was there before."""
    lm = make_lm("llama")
    rows = rows_for(lm)
    whole = with_store(lm)
    references = whole.log_probs(rows)
    assert (whole.store.misses, whole.store.hits) == (len(PASSAGES), len(rows) - len(PASSAGES))
    small = with_store(lm, 2 * whole.store.bytes_kept // share)
    small.encode_all([tuple(reversed(row.context)) for row in rows])
    small.store.misses = 0
    assert_same(small.log_probs(rows), references)
    assert small.store.bytes_kept <= small.store.capacity
    assert small.store.misses >= len(PASSAGES)
    assert share > 1 or small.store.misses == len(PASSAGES)


def test_bits_do_not_depend_on_what_is_kept(make_lm):
    lm = make_lm("llama", dtype=torch.bfloat16)
    first, second = rows_for(lm, queries=[QUERY]), rows_for(lm, queries=[Query("q2", "who was the king?")])
    warm, cold = with_store(lm), with_store(lm)
    warm.log_probs(first)
    assert_same(warm.log_probs(second), cold.log_probs(second), exactly=True)


def test_the_store_keeps_within_its_capacity(make_lm):
    lm = make_lm("llama")
    rows = rows_for(lm, queries=[QUERY])
    whole = with_store(lm)
    references = whole.log_probs(rows)
    small = with_store(lm, whole.store.bytes_kept // 2)
    for _ in range(2):
        assert_same(small.log_probs(rows), references, exactly=True)
    assert 0 < small.store.bytes_kept <= whole.store.bytes_kept // 2
    assert small.store.misses > len(rows)


def test_threads_may_share_a_model(make_lm):
    lm = make_lm("llama")
    rows = rows_for(lm)
    whole = with_store(lm)
    whole.log_probs(rows)
    stored = with_store(lm, whole.store.bytes_kept // 2)
    references = [stored.log_probs([row]) for row in rows]
    patience = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            for _ in range(5):
                for value, reference in zip(
                    pool.map(lambda row: stored.log_probs([row]), rows), references, strict=True
                ):
                    assert_same(value, reference, exactly=True)
    finally:
        sys.setswitchinterval(patience)
    assert stored.store.bytes_kept == sum(kept.nbytes for kept in stored.store._kept.values())


def test_what_does_not_fit_goes_to_disk_and_comes_back(make_lm, tmp_path):
    lm = make_lm("llama", dtype=torch.bfloat16)
    rows = rows_for(lm, queries=[QUERY])
    references = with_store(lm).log_probs(rows)
    stored = with_store(lm, 0, tmp_path)
    stored.log_probs(rows)
    assert len(list(tmp_path.rglob("*.safetensors"))) == len(PASSAGES)
    again = with_store(lm, 0, tmp_path)
    assert_same(again.log_probs(rows), references, exactly=True)
    assert again.store.misses == 0
    for path in tmp_path.rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:40])
    for misses in (len(PASSAGES), 0):  # what was damaged is written anew
        damaged = with_store(lm, 0, tmp_path)
        assert_same(damaged.log_probs(rows), references, exactly=True)
        assert damaged.store.misses == misses


def test_two_may_write_the_same_at_once(make_lm, tmp_path, monkeypatch):
    """In containers that share a folder, processes may have one number."""
    lm = make_lm("llama")
    row = rows_for(lm, queries=[QUERY])[0]
    one, other = (with_store(lm, 0, tmp_path) for _ in range(2))

    def save(tensors, path):
        save_file(tensors, path)
        monkeypatch.setattr(context_store, "save_file", save_file)
        other.log_probs([row])  # between the other's writing and its moving into place

    monkeypatch.setattr(context_store, "save_file", save)
    assert_same(one.log_probs([row]), with_store(lm).log_probs([row]), exactly=True)
    (path,) = (path for path in tmp_path.rglob("*") if path.is_file())
    assert path.suffix == ".safetensors"


def test_a_folder_that_is_full(make_lm, tmp_path):
    lm = with_store(make_lm("llama"), 0, tmp_path)
    rows = rows_for(lm, queries=[QUERY])
    shutil.rmtree(tmp_path)
    tmp_path.write_text("no folder")
    with pytest.raises(InputError, match=r"passage cache .* cannot be written"):
        lm.log_probs(rows)
    tmp_path.unlink()
    assert_same(lm.log_probs(rows), with_store(make_lm("llama")).log_probs(rows), exactly=True)
    assert list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize(("storage", "most"), [("int8", 0.05), ("fp8", 0.3)])
def test_eight_bits_take_half_the_room_and_change_scores_a_little(family, make_lm, tmp_path, storage, most):
    lm = make_lm(family, dtype=torch.bfloat16)
    rows = rows_for(lm)
    exact, small = with_store(lm), with_store(lm, storage=storage)
    references, first, second = exact.log_probs(rows), small.log_probs(rows), small.log_probs(rows)
    assert_same(second, first, exactly=True)
    apart = [float((value.target - other.target).abs().max()) for value, other in zip(first, references, strict=True)]
    assert 0 < max(apart) < most
    heads = small.encode(rows[0].context).cache.shape[-1]
    assert small.store.bytes_kept == exact.store.bytes_kept * (heads + 2) / (2 * heads)
    on_disk = with_store(lm, 0, tmp_path, storage=storage)
    on_disk.log_probs(rows)
    again = with_store(lm, 0, tmp_path, storage=storage)
    assert_same(again.log_probs(rows), first, exactly=True)
    assert again.store.misses == 0


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match=r"passage cache .*file.* cannot be made"):
            ContextStore(ENOUGH, folder)
        store = ContextStore(ENOUGH)
        with pytest.raises(InputError, match="cannot be made"):
            store.folder = folder
        assert store.folder is None


def test_a_position_with_large_numbers_does_not_spoil_the_others():
    cache = torch.ones(1, 2, 1, 3, 4)
    cache[..., 1, :] = 1000
    kept = Packed.of(Encoded(cache.bfloat16()), "int8").unpack().cache
    torch.testing.assert_close(kept.float(), cache, rtol=0.01, atol=0)


def test_zeros_stay_zeros():
    assert not Packed.of(Encoded(torch.zeros(1, 2, 1, 3, 4)), "fp8").unpack().cache.any()


def test_states_of_each_layer_have_a_file_of_their_own(make_lm, tmp_path):
    lm = make_lm("llama")
    (row, *_) = rows_for(lm, queries=[QUERY])
    stored, kept = with_store(lm, 0, tmp_path), with_store(lm)
    for _ in range(2):
        for layer in (0, None, 2):
            found, expected = stored.encode(row.context, layer), kept.encode(row.context, layer)
            assert torch.equal(found.cache, expected.cache)
            assert (found.states is None) == (layer is None)
            assert layer is None or torch.equal(found.states, expected.states)
    assert (stored.store.misses, stored.store.hits) == (3, 3)


def test_the_passage_prior_bypasses_the_store(make_lm):
    lm = make_lm("gpt2")
    stored = with_store(lm)
    rows = rows_for(lm)
    for value, reference in zip(
        stored.log_probs(rows, with_passage=True), lm.log_probs(rows, with_passage=True), strict=True
    ):
        torch.testing.assert_close(value.passage, reference.passage)
    assert stored.store.misses == 0


@pytest.mark.parametrize("batch_tokens", [1, 100])
def test_small_batches(make_lm, batch_tokens):
    lm = make_lm("gpt_neox")
    prompt = Prompt(load_template("qpeft"), lm.tokenizer, 128)
    rows = [prompt.rows(QUERY, passage)[0] for passage in PASSAGES]
    assert_same(with_store(lm, batch_tokens=batch_tokens).log_probs(rows), lm.log_probs(rows))


@pytest.mark.usefixtures("one_thread")
def test_batches_shrink_when_memory_runs_out(make_lm):
    plain = make_lm("llama")
    rows = rows_for(plain)
    model = ForgetfulModel(plain.model, most=4)
    lm = CausalLM(model, plain.tokenizer, name="small machine", max_length=128, batch_tokens=4096)
    assert_same(with_store(lm).log_probs(rows), plain.log_probs(rows))
    assert model.refused > 0


class CrowdedModel(ForgetfulModel):
    """A model on a machine that has no room for it beside so many bytes of kept contexts."""

    def __init__(self, model, store, room):
        super().__init__(model, most=1000)
        self.store, self.room = store, room

    def forward(self, **inputs):
        if self.store.bytes_kept > self.room:
            self.refused += 1
            raise torch.OutOfMemoryError("out of memory")
        return super().forward(**inputs)


@pytest.mark.usefixtures("one_thread")
def test_kept_contexts_make_room_when_memory_runs_out(make_lm):
    plain = make_lm("llama")
    lm = with_store(plain)
    rows = rows_for(plain, queries=[QUERY])
    references = plain.log_probs(rows)
    lm.log_probs(rows[:2])
    lm.model = CrowdedModel(plain.model, lm.store, lm.store.bytes_kept)
    assert_same(lm.log_probs(rows), references)
    assert lm.model.refused > 0
    lm.model.room = -1
    with pytest.raises(ModelError, match="do not fit in the memory"):
        lm.log_probs(rows)


def test_a_model_that_remembers_otherwise_is_refused():
    config = MambaConfig(vocab_size=320, hidden_size=32, num_hidden_layers=1, state_size=4)
    lm = CausalLM(MambaForCausalLM(config), None, name="a mamba", max_length=128, batch_tokens=4096)
    with pytest.raises(ModelError, match="a mamba: the passage cache"):
        with_store(lm)


def fetch(store, *values):
    """Get contexts one after another, and return those that had to be encoded."""
    made = []
    for value in values:
        whole = Encoded(torch.full((1, 2, 1, 2, 1), float(value)))
        found = store.get(((value, value), None, 1), lambda value=value, whole=whole: made.append(value) or whole)
        assert torch.equal(found.cache, whole.cache)
    return made


def test_an_error_of_encoding_is_not_kept():
    store = ContextStore(ENOUGH)
    with pytest.raises(ZeroDivisionError):
        store.get(((1, 1), None, 1), lambda: 1 / 0)
    assert fetch(store, 1, 1) == [1]


def test_what_is_on_disk_is_not_written_again(tmp_path):
    assert fetch(ContextStore(0, tmp_path), 1) == [1]
    (path,) = tmp_path.rglob("*.safetensors")
    written = path.stat().st_ino
    assert fetch(ContextStore(0, tmp_path), 1, 1) == []
    assert path.stat().st_ino == written


def test_what_was_used_last_stays():
    store = ContextStore(2 * 4 * torch.finfo().bits // 8)
    assert fetch(store, 1, 2, 1, 3, 1) == [1, 2, 3], "2 was not used for longer"
    assert store.has(((3, 3), None, 1))
    assert fetch(store, 4, 3) == [4], "what was asked for will be needed"


@pytest.mark.parametrize(("room", "ahead"), [(16, 0), (31, 0), (32, 16), (300, 40)])
def test_half_of_the_store_is_encoded_ahead(make_lm, room, ahead):
    lm = with_store(make_lm("llama"))
    lm.store.token_bytes = 10
    lm.store.capacity = room * 5 * lm.store.token_bytes
    assert lm._ahead([5] * 40) == ahead
    assert lm._ahead([5] * 8) == 8, "all, though they are few"


def test_few_tokens_are_encoded_in_one_pass_and_the_widest_first(make_lm):
    lm = with_store(make_lm("llama"))
    for length in (1, 16, 100, 500, 513, 1024, 1025, 5000):
        rows, width = lm._alike_shape(length)
        assert length <= width < length + 16
        assert rows == 1 or rows * width <= encoding.TOGETHER
    batches = lm._batches_alike([(1,) * length for length in (3, 40, 700, 20, 1500)])
    widths = [lm._alike_shape(max(map(len, batch)))[1] for batch in batches]
    assert widths == sorted(widths, reverse=True)


@pytest.mark.parametrize("layer", [None, 1])
def test_what_is_kept_of_a_context_holds_no_other(make_lm, layer):
    lm = with_store(make_lm("llama"))
    short, _ = lm.encode_all([(1, 3, 4), (1, *range(3, 15))], layer)
    for tensor in (short.cache, short.states):
        assert tensor is None or tensor.untyped_storage().nbytes() == tensor.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eight_bits_are_off_by_half_a_step(dtype):
    cache = torch.randn(2, 2, 3, 5, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    packed = Packed.of(Encoded(cache), "int8")
    step = cache.float().abs().amax(-1, keepdim=True) / 127
    off = (packed.numbers.float() * packed.scales.float() - cache.float()).abs() / step
    assert off.max() < 0.51
