"""Layers are computed twice, with the adapter on, and the model is as it was afterwards."""

import pytest
import torch

from qpeft.adapters import lora
from qpeft.errors import OptionError
from qpeft.lm.read_out import Answers
from qpeft.template import Prompt, load_template
from qpeft.training.checkpointing import checkpointed
from tiny_adapters import PASSAGES, QUERIES, build, with_store


def rows_for(lm):
    prompt = Prompt(load_template("rankllama"), lm.tokenizer, lm.max_length)
    return [prompt.rows(query, passage)[0] for query in QUERIES for passage in PASSAGES]


def trained(lm):
    torch.manual_seed(2)
    adapter = lora.build(lora.Config(r=2), lm)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    return adapter


def gradients(lm, adapter):
    rows = rows_for(lm)
    lm.read_batch(rows, Answers((7,)), [adapter] * len(rows)).sum().backward()
    found = [parameter.grad for parameter in adapter.parameters()]
    adapter.zero_grad()
    return found


def test_gradients_stay_the_same_and_layers_run_again(family, make_lm):
    lm = make_lm(family)
    adapter = trained(lm)
    calls = []
    first = next(module for module in lm._layers.modules[0].modules() if not list(module.children()))
    first.register_forward_hook(lambda *call: calls.append(1))
    expected = gradients(lm, adapter)
    once = len(calls)
    modes = [module.training for module in lm.model.modules()]
    with checkpointed(lm, adapter):
        again = gradients(lm, adapter)
        assert len(calls) == 3 * once, "forward, and forward and recomputation"
        rows = rows_for(lm)
        within = lm.read(rows, Answers((7,)), adapters=adapter)
    for one, other in zip(again, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    before = len(calls)
    gradients(lm, adapter)
    assert len(calls) - before == once, "no longer afterwards"
    assert [module.training for module in lm.model.modules()] == modes
    after = lm.read(rows, Answers((7,)), adapters=adapter)
    for one, other in zip(within, after, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def test_the_model_alone_can_be_scored_within(family, make_lm):
    """Its contexts would come from a store, and layers that are computed again take none."""
    lm = with_store(make_lm(family))
    prompt = Prompt(load_template("plain"), lm.tokenizer, lm.max_length)
    rows = [prompt.rows(query, passage)[0] for query in QUERIES for passage in PASSAGES]
    expected, _ = lm.score(rows)
    store = lm.store
    with checkpointed(lm, trained(lm)):
        within, _ = lm.score(rows)
    assert lm.store is store
    torch.testing.assert_close(within, expected, atol=1e-5, rtol=0)


def test_what_cannot_be_recomputed(make_lm):
    lm = make_lm("llama")
    with pytest.raises(OptionError, match="is for --adapter lora"), checkpointed(lm, build("soft_prompt", lm)):
        pass
    adapter = trained(lm)
    lm.model.supports_gradient_checkpointing = False
    with pytest.raises(OptionError, match="has no layers that can be computed again"), checkpointed(lm, adapter):
        pass
