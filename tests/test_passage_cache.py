import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM

from qpeft.errors import ModelError
from qpeft.lm import CausalLM
from qpeft.passage_cache import CachedCausalLM
from qpeft.template import Prompt, load_template
from qpeft.types import Query
from test_lm import PASSAGES, QUERY, ForgetfulModel, rows_for

ENOUGH = 1 << 30


def test_cached_scores_equal_uncached_ones(family, make_lm):
    lm = make_lm(family)
    cached = CachedCausalLM(lm, ENOUGH)
    rows = rows_for(lm)
    assert max(len(row.context) for row in rows) > 12, "longer than the sliding window, so that it bites"
    for _ in range(2):
        for value, reference in zip(cached.log_probs(rows), lm.log_probs(rows), strict=True):
            torch.testing.assert_close(value.target, reference.target, atol=1e-4, rtol=0)
    assert (cached.misses, cached.hits) == (len(PASSAGES), len(PASSAGES) * 3)


def test_bits_do_not_depend_on_what_is_cached(make_lm):
    lm = make_lm("llama", dtype=torch.bfloat16)
    first, second = rows_for(lm, queries=[QUERY]), rows_for(lm, queries=[Query("q2", "who was the king?")])
    warm, cold = CachedCausalLM(lm, ENOUGH), CachedCausalLM(lm, ENOUGH)
    warm.log_probs(first)
    for value, reference in zip(warm.log_probs(second), cold.log_probs(second), strict=True):
        assert torch.equal(value.target, reference.target)


def test_the_store_keeps_within_its_capacity(make_lm):
    lm = make_lm("llama")
    rows = rows_for(lm, queries=[QUERY])
    whole = CachedCausalLM(lm, ENOUGH)
    whole.log_probs(rows)
    small = CachedCausalLM(lm, whole.bytes_kept // 2)
    for _ in range(2):
        for value, reference in zip(small.log_probs(rows), whole.log_probs(rows), strict=True):
            assert torch.equal(value.target, reference.target)
    assert 0 < small.bytes_kept <= whole.bytes_kept // 2
    assert small.misses > len(rows)


def test_the_passage_prior_bypasses_the_cache(make_lm):
    lm = make_lm("gpt2")
    cached = CachedCausalLM(lm, ENOUGH)
    rows = rows_for(lm)
    for value, reference in zip(
        cached.log_probs(rows, with_passage=True), lm.log_probs(rows, with_passage=True), strict=True
    ):
        torch.testing.assert_close(value.passage, reference.passage)
    assert cached.misses == 0


@pytest.mark.parametrize("batch_tokens", [1, 100])
def test_small_batches(make_lm, batch_tokens):
    lm = make_lm("gpt_neox")
    prompt = Prompt(load_template("qpeft"), lm.tokenizer, 128)
    rows = [prompt.rows(QUERY, passage)[0] for passage in PASSAGES]
    cached = CachedCausalLM(lm, ENOUGH, batch_tokens)
    for value, reference in zip(cached.log_probs(rows), lm.log_probs(rows), strict=True):
        torch.testing.assert_close(value.target, reference.target, atol=1e-4, rtol=0)


def test_batches_shrink_when_memory_runs_out(make_lm):
    plain = make_lm("llama")
    rows = rows_for(plain)
    model = ForgetfulModel(plain.model, most=2)
    lm = CausalLM(model, plain.tokenizer, name="small machine", max_length=128, batch_tokens=4096)
    for value, reference in zip(CachedCausalLM(lm, ENOUGH).log_probs(rows), plain.log_probs(rows), strict=True):
        torch.testing.assert_close(value.target, reference.target, atol=1e-4, rtol=0)
    assert model.refused > 0


def test_a_model_that_remembers_otherwise_is_refused():
    config = MambaConfig(vocab_size=320, hidden_size=32, num_hidden_layers=1, state_size=4)
    lm = CausalLM(MambaForCausalLM(config), None, name="a mamba", max_length=128, batch_tokens=4096)
    with pytest.raises(ModelError, match="a mamba: the passage cache"):
        CachedCausalLM(lm, ENOUGH)
