"""Where additions stand, and what is left of a score when some of them are silenced."""

import itertools
import random

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, MambaConfig, MambaForCausalLM

from qpeft.adapters import lora
from qpeft.adapters._lora_targets import ARCHITECTURES, PROJECTIONS, Place, component_table, linear_layers
from qpeft.errors import OptionError
from tiny_adapters import rows_for
from tiny_models import FAMILIES, SPECIAL, build_family

FUSED = {"gpt2": ("qkv", "o", "up", "down"), "gpt_neox": ("qkv", "o", "up", "down"),
         "mixtral": ("q", "k", "v", "o", "gate_up", "down"), "bert": ("q", "k", "v", "o", "up", "down")}  # fmt: skip
GATED = ("q", "k", "v", "o", "gate", "up", "down")
ATTENTION = {"q", "k", "v", "qkv", "o"}


def trained(lm, *, seed=1, **options):
    """Return an adapter whose every parameter matters."""
    torch.manual_seed(seed)
    adapter = lora.build(lora.Config(**{"r": 3, **options}), lm)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    return adapter


def scores(lm, rows, adapter):
    return torch.cat([value.target for value in lm.log_probs(rows, adapters=adapter)])


def half_of(adapter, seed=0):
    places = list(adapter.places())
    return frozenset(random.Random(seed).sample(places, len(places) // 2))


def test_every_linear_layer_has_a_place(family):
    model = build_family(family)
    table = component_table(model)
    expected = {
        Place(layer, projection, "attention" if projection in ATTENTION else "mlp")
        for layer in range(2)
        for projection in FUSED.get(family, GATED)
    }
    assert set(table.values()) == expected
    assert len(table) == len(expected), "no two layers stand at one place"
    without = {"cls.predictions.transform.dense"} if family == "bert" else set()
    experts = {name for name in table if "experts" in name}
    assert set(table) - experts == set(linear_layers(model)) - without
    assert all(f".{place.layer}." in name for name, place in table.items())


def test_scales_are_those_of_their_places(family, make_lm):
    lm = make_lm(family)
    adapter = trained(lm, alpha=6)
    assert list(adapter.scales()) == list(adapter.places())
    assert set(adapter.scales().values()) == {2.0}
    some = half_of(adapter)
    with adapter.only(some):
        assert {place for place, scale in adapter.scales().items() if scale} == some


def test_places_come_in_the_order_of_the_work(family):
    table = list(component_table(build_family(family)).values())
    assert table == sorted(table, key=lambda place: (place.layer, PROJECTIONS.index(place.projection)))


def test_every_table_speaks_of_known_projections():
    for parts in ARCHITECTURES.values():
        assert set(parts.attention.values()) <= ATTENTION
        assert {*parts.mlp.values(), *parts.experts.values()} <= set(PROJECTIONS) - ATTENTION


@pytest.mark.parametrize("kind", sorted(ARCHITECTURES.keys() - FAMILIES.keys()))
def test_tables_fit_the_models_of_transformers(kind):
    """Every tail of a table is a layer of that architecture, and no layer of attention or MLP is left out."""
    options = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
               "num_key_value_heads": 2, "vocab_size": 320, "head_dim": 8, **SPECIAL}  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **options))
    table, parts = component_table(model), ARCHITECTURES[kind]
    assert {place.projection for place in table.values()} == {*parts.attention.values(), *parts.mlp.values()}
    assert set(table) == set(linear_layers(model))


def test_names_do_not_depend_on_what_has_been_put_in(family, make_lm):
    lm = make_lm(family)
    before = component_table(lm.model)
    adapters = [trained(lm, seed=1), trained(lm, seed=2, r=1)]
    assert component_table(lm.model) == before
    for adapter, rank in zip(adapters, (3, 1), strict=True):
        places = adapter.places()
        assert list(places) == list(before.values())
        assert sum(places.values()) == adapter.count_parameters()
        assert all(count % rank == 0 for count in places.values())


def test_models_without_a_table(make_lm):
    model = MambaForCausalLM(MambaConfig(vocab_size=320, hidden_size=32, num_hidden_layers=1, state_size=4))
    with pytest.raises(OptionError, match="'mamba' has no table; its linear layers are in_proj, x_proj"):
        component_table(model)
    lm = make_lm("bert")
    with pytest.raises(OptionError, match=r"cls\.predictions\.transform\.dense are none"):
        lora.build(lora.Config(modules="transform.dense"), lm).places()


@pytest.mark.parametrize("modules", ["all", "attention", "mlp"])
def test_none_and_all(family, make_lm, modules):
    lm = make_lm(family)
    adapter = trained(lm, modules=modules)
    rows = rows_for(lm, adapter)
    base, whole = scores(lm, rows, None), scores(lm, rows, adapter)
    assert (base - whole).abs().max() > 0.01, "additions without influence would hide mistakes"
    with adapter.only(()):
        assert torch.equal(scores(lm, rows, adapter), base)
    with adapter.only(adapter.places()):
        assert torch.equal(scores(lm, rows, adapter), whole)
    assert torch.equal(scores(lm, rows, adapter), whole)


def test_silenced_additions_equal_those_whose_weights_are_zero(family, make_lm):
    lm = make_lm(family)
    adapter = trained(lm)
    rows = rows_for(lm, adapter)
    places = list(adapter.places())
    for active in (half_of(adapter), *(frozenset(places) - {place} for place in places)):
        other = make_lm(family)
        zeroed = trained(other)
        table = component_table(other.model)
        by_path = {(path, getattr(layer, "parameter_name", None)): layer for path, layer in zeroed._layers.items()}
        with torch.no_grad():
            for (path, parameter), layer in by_path.items():
                name = path.replace(".base_layer", "") + (f".{parameter}" if parameter else "")
                if table[name] not in active:
                    layer.lora_B[zeroed.label].weight.zero_()
        with adapter.only(active):
            found = scores(lm, rows, adapter)
        torch.testing.assert_close(found, scores(other, rows, zeroed), atol=1e-6, rtol=0)


def test_every_addition_matters(family, make_lm):
    lm = make_lm(family)
    adapter = trained(lm)
    rows = rows_for(lm, adapter)
    places = list(adapter.places())
    found = [scores(lm, rows, adapter)]
    for place in places:
        with adapter.only(set(places) - {place}):
            found.append(scores(lm, rows, adapter))
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(found, 2))


def test_order_and_nesting(make_lm):
    lm = make_lm("llama")
    adapter = trained(lm)
    rows = rows_for(lm, adapter)
    whole = scores(lm, rows, adapter)
    some, others = half_of(adapter, 1), half_of(adapter, 2)
    assert some & others not in (some, others)
    with adapter.only(some & others):
        expected = scores(lm, rows, adapter)
    with adapter.only(sorted(some & others, key=str, reverse=True)):
        assert torch.equal(scores(lm, rows, adapter), expected)
    for outer, inner in ((some, others), (others, some)):
        with adapter.only(outer):
            before = scores(lm, rows, adapter)
            with adapter.only(inner):
                assert torch.equal(scores(lm, rows, adapter), expected)
            assert torch.equal(scores(lm, rows, adapter), before)
    assert torch.equal(scores(lm, rows, adapter), whole)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_all_act_again_after_an_error(family, make_lm):
    lm = make_lm(family)
    adapter = trained(lm)
    rows = rows_for(lm, adapter)
    whole = scores(lm, rows, adapter)
    with pytest.raises(KeyError, match="midst"), adapter.only(()):
        raise KeyError("midst")
    assert torch.equal(scores(lm, rows, adapter), whole)
    with pytest.raises(OptionError, match=r"no addition at Place\(layer=7"), adapter.only([Place(7, "q", "attention")]):
        pass
    assert torch.equal(scores(lm, rows, adapter), whole)


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_other_adapters_of_the_model_are_left_alone(family, make_lm):
    lm = make_lm(family)
    first, second = trained(lm, seed=1), trained(lm, seed=2)
    rows = rows_for(lm, first)
    expected = scores(lm, rows, second)
    with first.only(()):
        assert torch.equal(scores(lm, rows, second), expected)


def test_a_hint_goes_on_acting(make_lm):
    lm = make_lm("llama")
    adapter = trained(lm, hint="soft_prompt")
    rows = rows_for(lm, adapter)
    with adapter.only(()):
        found = scores(lm, rows, adapter)
    assert not torch.equal(found, scores(lm, rows, adapter))
    torch.testing.assert_close(found, scores(lm, rows, adapter.qpeft), atol=1e-5, rtol=0)
