import pytest
import torch
from test_causal import assert_close, rows_for
from torch import nn

from qpeft.lm.last_layer import KERNELS, LastLayer
from qpeft.losses import loss
from reference import naive_log_probs
from tiny_adapters import alike
from tiny_adapters import build as build_adapter


def positions_through_last_layer(lm, run):
    """Return how many positions went through each linear layer of the last layer while `run` ran, by their names."""
    seen = {}
    hooks = []
    for name, module in lm._layers.modules[-1].named_modules():
        if isinstance(module, nn.Linear):

            def count(_, inputs, out, name=name):
                seen[name] = seen.get(name, 0) + out[..., 0].numel()

            hooks.append(module.register_forward_hook(count))
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return seen


pytestmark = pytest.mark.usefixtures("no_rounding", "one_thread")


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_scores_are_those_of_the_whole_layer(family, make_lm, kernel, side):
    lm = make_lm(family, padding_side=side)
    if kernel == "sdpa" and family == "gemma2":
        pytest.skip("transformers has no such attention for it")
    lm.model.set_attn_implementation(kernel)
    rows = rows_for(lm)
    assert lm.spares_last_layer
    assert_close(lm.log_probs(rows), [naive_log_probs(lm.model, row) for row in rows])


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "bert"])
def test_the_last_layer_goes_on_only_where_a_token_is_predicted(make_lm, family):
    lm = alike(make_lm(family), batch_tokens=1)
    rows = rows_for(lm)
    seen = positions_through_last_layer(lm, lambda: lm.log_probs(rows))
    predicted, positions = sum(sum(row.scored) for row in rows), sum(len(row) - 1 for row in rows)
    into = {"q_proj", "k_proj", "v_proj", "query_key_value", "query", "key", "value"}
    for name, count in seen.items():
        expected = predicted + (positions if name.rpartition(".")[2] in into else 0)
        assert count == expected, name
    assert len(seen) > 3


def test_all_is_computed_where_all_is_scored(make_lm):
    lm = alike(make_lm("llama"), batch_tokens=1)
    rows = rows_for(lm)
    seen = positions_through_last_layer(lm, lambda: lm.log_probs(rows, with_passage=True))
    assert set(seen.values()) == {sum(len(row) - 1 for row in rows)}


def test_the_model_is_whole_afterwards(make_lm):
    lm = make_lm("llama")
    layers, called = lm._layers, getattr(lm._layers.parent, lm._layers.name)
    with pytest.raises(ZeroDivisionError), LastLayer(layers).only_at(torch.ones(1, 3).bool()):
        1 / (getattr(layers.parent, layers.name) is called)
    assert getattr(layers.parent, layers.name) is called


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_gradients_are_those_of_the_whole_layer(make_lm, family, monkeypatch):
    lm = make_lm(family)
    adapter = build_adapter("lora", lm, trained=True, r=2).requires_grad_(True)
    rows = rows_for(lm)

    def gradients():
        adapter.zero_grad()
        values, counts = lm.score(rows, [adapter] * len(rows))
        means = torch.stack([part.mean() for part in torch.split(values, counts)])
        scores = means.view(1, -1)
        loss("both", scores, torch.ones_like(scores).bool(), margin=0.5, scale=1.0, teacher=None).backward()
        return {name: parameter.grad.clone() for name, parameter in adapter.named_parameters()}

    spared = gradients()
    monkeypatch.setattr(type(lm), "spares_last_layer", False)
    whole = gradients()
    assert any(gradient.abs().max() > 1e-3 for gradient in whole.values())
    for name, gradient in whole.items():
        torch.testing.assert_close(spared[name], gradient, atol=1e-5, rtol=1e-4)


def test_a_layer_that_is_given_something_unknown_is_computed_as_ever(make_lm):
    lm = alike(make_lm("llama"), batch_tokens=1)
    rows = rows_for(lm)[:2]
    expected = lm.log_probs(rows)

    before = lm.model.model.forward
    lm.model.model.forward = lambda *args, **kwargs: before(*args, unknown=torch.zeros(3), **kwargs)
    found = []
    seen = positions_through_last_layer(lm, lambda: found.extend(lm.log_probs(rows)))
    assert_close(found, [(value.target.tolist(), None) for value in expected])
    assert set(seen.values()) == {sum(len(row) - 1 for row in rows)}


def test_the_last_layer_is_spared_until_the_last_of_several_is_done(make_lm):
    lm = make_lm("llama")
    layers, last = lm._layers, lm._last
    whole = getattr(layers.parent, layers.name)
    one, other = (last.only_at(torch.ones(1, 3).bool()) for _ in range(2))
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    assert getattr(layers.parent, layers.name) is not whole
    other.__exit__(None, None, None)
    assert getattr(layers.parent, layers.name) is whole
