"""Sets of additions, the order in which they are run, and rankings under them with and without shared work."""

import itertools
import random
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from test_causal import ForgetfulModel

from qpeft import methods
from qpeft.adapters import lora
from qpeft.adapters._folder import AdapterFolder
from qpeft.adapters._lora_targets import Place
from qpeft.analysis.ablated import Ablated
from qpeft.analysis.ablation import ALL, NONE, Ablation, of_components, of_layers, of_projections, plan
from qpeft.errors import ModelError, OptionError
from qpeft.lm.depth import find_layers
from qpeft.lm.replay import Replay
from qpeft.pointwise import Pointwise
from qpeft.template import load_template
from qpeft.types import Candidates
from tiny_adapters import PASSAGES, QUERIES
from tiny_models import FAMILIES

ITEMS = [Candidates(query, PASSAGES) for query in QUERIES]
DEEP = {family: "n_layer" if family == "gpt2" else "num_hidden_layers" for family in FAMILIES}


def grid(layers=4, projections=("q", "v", "up")):
    """Return the places of a model."""
    return [
        Place(layer, name, "mlp" if name == "up" else "attention") for layer in range(layers) for name in projections
    ]


def by_kind(ablations):
    found = {}
    for each in ablations:
        found.setdefault(each.kind, {})[each.name] = each.active
    return found


READ = {
    "query_likelihood": ("plain", {}),
    "classifier": ("rankllama", {}),
    "yes_no": ("yes_no", {"yes": "new", "no": "old"}),
}
"""Method → its template, and options that make sense with the words of the tiny tokenizer."""


def opened(make_lm, monkeypatch, family, layers=3, method="query_likelihood", **options):
    """Return a deeper model of a family, an adapter whose every parameter matters, and a reranker with it."""
    monkeypatch.setitem(FAMILIES, family, FAMILIES[family] | {DEEP[family]: layers})
    lm = make_lm(family, batch_tokens=80)  # several batches for each query
    torch.manual_seed(1)
    adapter = lora.build(lora.Config(**({"r": 2} | options)), lm)
    if method == "classifier":
        adapter.add_head(lm)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    template, own = READ[method]
    folder = AdapterFolder("lora", adapter, load_template(template), None, "0", method=method, method_options=own)
    scorer = methods.open_scorer(lm, folder)
    return lm, adapter, Pointwise(scorer)


def references(places):
    return [Ablation("reference", ALL, frozenset(places)), Ablation("reference", NONE, frozenset())]


def every_study(places, window=2):
    return [*references(places), *of_layers(places, window), *of_projections(places, grid=True), *of_components(places)]


def test_by_layer():
    places = grid()
    found = by_kind(of_layers(places, 3))

    def layers(*chosen):
        return {place for place in places if place.layer in chosen}

    assert found["all but one layer"]["without layer 2"] == layers(0, 2, 3)
    assert found["one layer alone"] == {f"layer {i + 1}": layers(i) for i in range(4)}
    assert found["a window alone"] == {"layers 1–3": layers(0, 1, 2), "layers 2–4": layers(1, 2, 3)}
    assert found["all but a window"] == {"without layers 1–3": layers(3), "without layers 2–4": layers(0)}
    assert found["from the bottom"] == {f"lowest {n}": layers(*range(n)) for n in (1, 2, 3)}
    assert found["from the top"] == {f"highest {n}": layers(*range(4 - n, 4)) for n in (1, 2, 3)}
    middles = {each.name: each.x for each in of_layers(places, 3) if each.kind == "a window alone"}
    assert middles == {"layers 1–3": 2.0, "layers 2–4": 3.0}
    for window in (0, 4, 5):
        with pytest.raises(OptionError, match=rf"--window is {window}; the adapter has additions in 4 layers"):
            list(of_layers(places, window))


def test_by_layer_where_some_layers_have_none():
    places = [place for place in grid() if place.layer in (1, 3)]
    found = by_kind(of_layers(places, 1))
    assert set(found["one layer alone"]) == {"layer 2", "layer 4"}
    assert {place.layer for place in found["from the bottom"]["lowest 1"]} == {1}


def test_by_projection_and_component():
    places = grid(2)
    found = by_kind(of_projections(places))
    assert set(found) == {"all but one projection", "one projection alone"}
    assert found["one projection alone"]["up"] == {place for place in places if place.projection == "up"}
    assert found["all but one projection"]["without v"] == {place for place in places if place.projection != "v"}
    cells = [each for each in of_projections(places, grid=True) if each.kind.startswith("grid")]
    assert len(cells) == 2 * len(places)
    for each in cells:
        chosen = {p for p in places if (p.layer + 1, p.projection) == (each.x, each.projection)}
        assert each.active == (chosen if each.kind == "grid, one alone" else set(places) - chosen)
    found = by_kind(of_components(places))["one component acts"]
    assert found["mlp of both"] == {place for place in places if place.projection == "up"}
    assert found["attention of both"] == set(places) - found["mlp of both"]
    assert not list(of_components([place for place in places if place.component == "mlp"]))


def prefixes(sets, layers):
    """Return all different settings of the first layers, for every number of layers: what must be run at least."""
    return {
        (depth, frozenset(place for place in active if place.layer < depth))
        for active in sets
        for depth in range(1, layers + 1)
    }


@pytest.mark.parametrize("seed", range(20))
def test_the_order_runs_each_setting_of_the_first_layers_once(seed):
    places, layers = grid(5), 5
    draw = random.Random(seed)
    sets = [frozenset(draw.sample(places, draw.randint(0, len(places)))) for _ in range(12)]
    sets += [each.active for each in every_study(places)] if seed % 2 else sets[:3]
    steps = plan(sets, layers)
    assert sorted(map(hash, {step.active for step in steps})) == sorted(map(hash, set(sets)))
    assert len(steps) == len(set(sets))
    assert sum(layers - step.shared for step in steps) == len(prefixes(sets, layers))


@pytest.mark.parametrize("seed", range(10))
def test_states_that_the_order_takes_are_those_of_the_same_setting(seed):
    """A walk with pencil and paper: what is kept behind a depth is named by the setting that made it."""
    places, draw = grid(5), random.Random(seed)
    sets = [frozenset(draw.sample(places, draw.randint(0, len(places)))) for _ in range(15)]
    sets += [each.active for each in of_layers(places, 2)]
    kept = {}
    for step in plan(sets, 5):
        below = {depth: frozenset(p for p in step.active if p.layer < depth) for depth in range(6)}
        if step.shared:
            assert kept[step.shared] == below[step.shared]
        kept = {depth: made for depth, made in kept.items() if depth <= step.shared}
        kept |= {depth: below[depth] for depth in step.keep if depth > step.shared}


@pytest.mark.parametrize("layers", [6, 32])
def test_leaving_out_one_layer_costs_half(layers):
    places = grid(layers, ("q",))
    sets = [frozenset(places), *(frozenset(places) - {place} for place in places)]
    assert sum(layers - step.shared for step in plan(sets, layers)) == layers + layers * (layers + 1) // 2


def plain(adapter, reranker, sets, items):
    """Rank under every set, with nothing shared."""
    found = {}
    for active in sets:
        with adapter.only(active):
            found[active] = list(reranker.rerank(items))
    return found


def test_shared_work_changes_no_score(family, make_lm, monkeypatch):
    lm, adapter, reranker = opened(make_lm, monkeypatch, family)
    sets = [each.active for each in every_study(list(adapter.places()))]
    before = list(reranker.rerank(ITEMS))
    shared = Ablated(lm, adapter, reranker, sets)
    for items in (ITEMS[:1], ITEMS[1:], ITEMS):
        found = shared.rank(items)
        assert set(found) == set(sets)
        assert found == plain(adapter, reranker, sets, items)
    assert shared.why_not == ""
    done, would = shared.work
    assert done / would == len(prefixes(sets, 3)) / (3 * len(set(sets)))
    assert done < 0.75 * would
    for active, rankings in found.items():
        with adapter.only(active):
            assert list(reranker.rerank(ITEMS)) == rankings, "each under its own name"
    different = {tuple(tuple(ranking.hits) for ranking in rankings) for rankings in found.values()}
    assert len(different) == len(set(sets)), "every set matters"
    assert list(reranker.rerank(ITEMS)) == before
    assert not any("forward" in vars(layer) for layer in find_layers(lm.model).modules)


@pytest.mark.usefixtures("one_thread")  # the bits of experts depend on the batch, and batches on the threads
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "bert"])
@pytest.mark.parametrize("method", ["classifier", "yes_no"])
def test_whatever_is_read_out(method, family, make_lm, monkeypatch):
    lm, adapter, reranker = opened(make_lm, monkeypatch, family, method=method)
    sets = [each.active for each in [*references(adapter.places()), *of_layers(list(adapter.places()), 2)]]
    shared = Ablated(lm, adapter, reranker, sets)
    expected = plain(adapter, reranker, sets, ITEMS)
    shared.rank(ITEMS[:1])
    assert shared.why_not == ""
    assert shared.rank(ITEMS) == expected
    assert len({str(rankings) for rankings in expected.values()}) == len(set(sets))
    with adapter.only(()):
        silenced = list(reranker.rerank(ITEMS))
    lm.head = adapter.head  # then the model alone is one that has this head
    assert silenced == list(Pointwise(reranker._scorer.using(None)).rerank(ITEMS)) == expected[frozenset()]


def test_with_a_hint_beside_the_additions(make_lm, monkeypatch):
    lm, adapter, reranker = opened(make_lm, monkeypatch, "llama", hint="soft_prompt")
    sets = [each.active for each in every_study(list(adapter.places()))]
    shared = Ablated(lm, adapter, reranker, sets)
    shared.rank(ITEMS)
    assert shared.why_not == ""
    assert shared.rank(ITEMS) == plain(adapter, reranker, sets, ITEMS)


@pytest.mark.usefixtures("one_thread")  # so that a layer reads what its own batch left
def test_where_states_cannot_be_shared_all_is_computed(make_lm, monkeypatch):
    """A layer that reads more than the states before it, such as what an earlier layer left somewhere."""
    lm, adapter, reranker = opened(make_lm, monkeypatch, "llama")
    sets = [each.active for each in every_study(list(adapter.places()))]
    first, last = lm.model.model.layers[0], lm.model.model.layers[2]
    seen = []
    first.self_attn.register_forward_hook(lambda layer, args, out: seen.append(out[0].sum()))
    original = last.forward
    last.forward = lambda states, **kwargs: original(states, **kwargs) + seen[-1]
    own = last.forward
    expected = plain(adapter, reranker, sets, ITEMS)
    shared = Ablated(lm, adapter, reranker, sets)
    assert shared.rank(ITEMS) == expected
    assert (shared.work, shared.why_not) == ((0, 0), "shared states change scores")
    assert shared.rank(ITEMS) == expected
    assert vars(last)["forward"] is own


class Crowded(ForgetfulModel):
    """A machine on which, after so many calls, others take the memory."""

    after = None

    def forward(self, **inputs):
        if self.after is not None:
            self.after -= 1
            if self.after < 0:
                self.most = 1
        return super().forward(**inputs)


@pytest.mark.usefixtures("one_thread")  # so that calls come one after another
def test_when_memory_runs_out_between_two_sets(make_lm, monkeypatch):
    """Then batches change, and states that were kept are of no use to the candidates at hand; to the next they are."""
    lm, adapter, reranker = opened(make_lm, monkeypatch, "llama")
    sets = [each.active for each in of_layers(list(adapter.places()), 2)]
    expected = [plain(adapter, reranker, sets, [item]) for item in ITEMS]
    lm.model = Crowded(lm.model, most=99)
    shared = Ablated(lm, adapter, reranker, sets)
    assert shared.rank(ITEMS[:1]) == expected[0]
    assert shared.why_not == ""
    lm.model.after = 4
    found = shared.rank(ITEMS[1:2])
    assert lm.model.refused > 0
    assert re.search("other inputs|was called", shared.why_not)
    assert shared.work != (0, 0)
    for active, (ranking,) in expected[1].items():
        scores = {hit.passage_id: hit.score for hit in found[active][0].hits}
        assert scores == pytest.approx({hit.passage_id: hit.score for hit in ranking.hits}, abs=1e-5)
    spared = shared.work[1] - shared.work[0]
    lm.model.after = None
    lm.model.most = 1
    shared.rank(ITEMS[:1])
    assert shared.why_not == "", "batches of one row by now"
    assert shared.work[1] - shared.work[0] > spared


def test_models_whose_layers_cannot_be_told(make_lm, monkeypatch):
    lm, adapter, reranker = opened(make_lm, monkeypatch, "llama")
    sets = [each.active for each in of_layers(list(adapter.places()), 2)]
    expected = plain(adapter, reranker, sets, ITEMS)
    lm.model.others = torch.nn.ModuleList(torch.nn.Identity() for _ in range(3))
    shared = Ablated(lm, adapter, reranker, sets)
    assert "has 2 lists of 3 layers" in shared.why_not
    assert shared.rank(ITEMS) == expected
    assert shared.work == (0, 0)


def test_additions_that_are_not_there(make_lm, monkeypatch):
    lm, adapter, reranker = opened(make_lm, monkeypatch, "llama")
    with pytest.raises(OptionError, match="no addition at"):
        Ablated(lm, adapter, reranker, [frozenset([Place(9, "q", "attention")])])


def ids(*values):
    return {"input_ids": torch.tensor([values]), "use_cache": False}


@torch.no_grad()
def test_a_replay_notices_other_inputs(make_lm):
    model = make_lm("llama").model
    replay = Replay(find_layers(model))
    with replay.run(keep=[1]):
        first = model(**ids(5, 6)).logits
    with replay.run(1):
        assert torch.equal(model(**ids(5, 6)).logits, first)
    assert (replay.computed, replay.spared) == (3, 1)
    with pytest.raises(ModelError, match="other inputs"), replay.run(1):
        model(**ids(5, 7))

    def twice():
        with replay.run(1):
            model(**ids(5, 6))
            model(**ids(5, 6))

    with pytest.raises(ModelError, match="was called 2 times, and 1 times before"):
        twice()
    with pytest.raises(ModelError, match="was called 0 times, and 1 times before"), replay.run(1):
        pass
    with pytest.raises(ModelError, match="no states were kept behind 2 layers"), replay.run(2):
        pass
    with pytest.raises(ModelError, match="stored contexts"), replay.run():
        model(input_ids=torch.tensor([[5, 6]]), use_cache=True)
    assert torch.equal(model(**ids(5, 6)).logits, first)


def test_calls_in_any_order_and_from_several_threads(make_lm):
    """Each finds the states of its own input."""
    model = make_lm("llama").model
    replay = Replay(find_layers(model))
    inputs = [ids(word, word + 1, *[9] * (word % 3)) for word in range(5, 25)]

    @torch.no_grad()
    def logits(one):
        return model(**one).logits

    expected = [logits(one) for one in inputs]
    with ThreadPoolExecutor(4) as pool:
        for shared, keep in ((0, [1]), (1, [2]), (2, []), (1, [])):
            order = random.Random(shared).sample(range(len(inputs)), len(inputs))
            with replay.run(shared, keep):
                found = list(pool.map(logits, [inputs[i] for i in order]))
            assert all(torch.equal(found[place], expected[i]) for place, i in enumerate(order))
    assert (replay.computed, replay.spared) == (4 * 20, 4 * 20)


def test_batches_side_by_side(make_lm, monkeypatch):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        lm, adapter, reranker = opened(make_lm, monkeypatch, "llama")
        sets = [each.active for each in every_study(list(adapter.places()))]
        shared = Ablated(lm, adapter, reranker, sets)
        shared.rank(ITEMS[:1])
        assert shared.why_not == ""
        assert shared.rank(ITEMS) == plain(adapter, reranker, sets, ITEMS)
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def test_a_new_replay_forgets_the_old(make_lm):
    model = make_lm("llama").model
    replay = Replay(find_layers(model))
    for words in ((5, 6), (7, 8, 9)):
        expected = model(**ids(*words)).logits
        with replay.run(keep=[1, 2]):
            model(**ids(*words))
        for shared in (2, 1):
            with replay.run(shared):
                assert torch.equal(model(**ids(*words)).logits, expected)
    with replay.run():
        model(**ids(5))
    with pytest.raises(ModelError, match="no states were kept"), replay.run(1):
        pass


def test_all_pairs_of_kinds_have_names_of_their_own():
    places = grid()
    for one, other in itertools.combinations(every_study(places), 2):
        assert (one.kind, one.name) != (other.kind, other.name)
