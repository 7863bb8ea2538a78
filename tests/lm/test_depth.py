from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from test_causal import ForgetfulModel, assert_close, rows_for

from qpeft.errors import ModelError, OptionError
from qpeft.lm.depth import find_layers
from reference import naive_hinted_log_probs, naive_hints, naive_log_probs
from tiny_adapters import alike, with_store
from tiny_adapters import build as build_adapter
from tiny_adapters import rows_for as hinted_rows
from tiny_models import build_family


def shallow(family, layers=1):
    """Return a model that was made with fewer layers, with the weights of the first ones of its family."""
    whole, model = build_family(family), build_family(family, num_hidden_layers=layers)
    weights = whole.state_dict()
    model.load_state_dict({name: weights[name] for name in model.state_dict()})
    assert sum(1 for _ in model.parameters()) < sum(1 for _ in whole.parameters())
    return model


def exactly_equal(values, others):
    return all(torch.equal(one.target, other.target) for one, other in zip(values, others, strict=True))


@pytest.mark.parametrize("kept", [False, True], ids=["whole", "kept"])
def test_scores_equal_those_of_a_model_made_with_so_many_layers(family, make_lm, kept):
    lm = make_lm(family)
    lm = with_store(lm) if kept else lm
    rows = rows_for(lm)
    before = lm.log_probs(rows)
    assert_close(lm.log_probs(rows, depth=1), [naive_log_probs(shallow(family), row) for row in rows])
    assert exactly_equal(lm.log_probs(rows), before)
    if kept:
        assert (lm.store.misses, lm.store.hits) == (8, 16), "contexts are encoded anew for another depth"


@pytest.mark.parametrize("name", ["qpeft_a", "qpeft_c"])
def test_hints_are_read_by_the_first_layers(make_lm, name):
    lm, reference = make_lm("llama"), shallow("llama")
    options = {"layer": 0} if name == "qpeft_c" else {}
    adapter = build_adapter(name, lm, trained=True, **options)
    rows = hinted_rows(lm, adapter)
    expected = [(naive_hinted_log_probs(reference, row, naive_hints(lm.model, adapter, row)), None) for row in rows]
    for each in (lm, with_store(lm)):
        assert_close(each.log_probs(rows, adapters=adapter, depth=1), expected)


def test_states_are_all_there_after_a_first_look_at_few_layers(make_lm):
    """transformers looks for the layers when it is first asked for states, and only then."""
    lm, fresh = make_lm("llama"), make_lm("llama")
    adapter, reference = (build_adapter("qpeft_c", each, trained=True, layer=1) for each in (lm, fresh))
    rows = hinted_rows(lm, adapter)
    with find_layers(lm.model).first(1):
        lm.model(input_ids=torch.tensor([rows[0].context]), output_hidden_states=True)
    assert exactly_equal(lm.log_probs(rows, adapters=adapter), fresh.log_probs(rows, adapters=reference))


def test_lora_changes_the_first_layers(make_lm):
    pytest.importorskip("peft")
    lm = make_lm("llama")
    reference = alike(lm, model=shallow("llama"))
    adapters = [build_adapter("lora", each, trained=True) for each in (lm, reference)]
    weights = adapters[0].state_dict()
    adapters[1].load_state_dict({name: weights[name] for name in adapters[1].state_dict()})
    rows = hinted_rows(lm, adapters[0])
    expected = reference.log_probs(rows, adapters=adapters[1])
    assert not exactly_equal(expected, reference.log_probs(rows))
    for one, other in zip(lm.log_probs(rows, adapters=adapters[0], depth=1), expected, strict=True):
        torch.testing.assert_close(one.target, other.target, atol=1e-4, rtol=0)


def test_the_model_is_whole_again_after_an_error(family, make_lm):
    lm = make_lm(family)
    rows, layers = rows_for(lm), find_layers(lm.model).modules
    before, modules = lm.log_probs(rows), dict(lm.model.named_modules())
    with pytest.raises(KeyError, match="midst"), find_layers(lm.model).first(1):
        raise KeyError("midst")
    handle = layers[0].register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyError("midst")))
    with pytest.raises(KeyError, match="midst"):
        lm.log_probs(rows, depth=1)
    handle.remove()
    assert find_layers(lm.model).modules is layers
    assert dict(lm.model.named_modules()) == modules
    assert exactly_equal(lm.log_probs(rows), before)


def test_depths_that_make_no_sense(make_lm, t5):
    lm = make_lm("llama")
    rows = rows_for(lm)
    for depth in (0, -1, 2, 3):
        with pytest.raises(OptionError, match=rf"layers={depth}: tiny-llama has 2 layers; take from 1 to 1"):
            lm.log_probs(rows, depth=depth)
    with pytest.raises(OptionError, match="tiny-t5: only decoder-only models"):
        t5.log_probs(rows, depth=1)
    adapter = build_adapter("qpeft_c", lm, layer=1)
    with pytest.raises(OptionError, match="layers=1: the adapter reads states of layer 1"):
        lm.log_probs(hinted_rows(lm, adapter), adapters=adapter, depth=1)


def test_layers_that_cannot_be_told(make_lm):
    lm = make_lm("llama")
    model = ForgetfulModel(lm.model, most=9)
    model.others = torch.nn.ModuleList(torch.nn.Identity() for _ in range(2))
    with pytest.raises(ModelError, match="'llama' has 2 lists of 2 layers"):
        find_layers(model)
    lm = alike(lm, model=model)
    with pytest.raises(OptionError, match="tiny-llama cannot be cut to its first layers"):
        lm.log_probs(rows_for(lm), depth=1)
    broken = make_lm("gpt2").model
    broken.transformer.h = torch.nn.ModuleList([broken.transformer.h[0]])
    with pytest.raises(ModelError, match="has no lists of 2 layers"):
        find_layers(broken)


def test_a_list_within_a_layer_is_not_the_layers(make_lm):
    model = make_lm("llama").model
    for layer in model.model.layers:
        layer.experts = torch.nn.ModuleList(torch.nn.Identity() for _ in range(2))
    assert find_layers(model).modules is model.model.layers


def test_threads_do_not_meet_at_one_depth(make_lm):
    lm = make_lm("llama")
    rows = rows_for(lm)
    expected = {depth: lm.log_probs(rows, depth=depth) for depth in (None, 1)}
    depths = [None, 1] * 20
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda depth: lm.log_probs(rows, depth=depth), depths))
    assert all(exactly_equal(values, expected[depth]) for depth, values in zip(depths, found, strict=True))
