import pytest
import torch

from qpeft.errors import OptionError
from qpeft.methods import query_likelihood
from qpeft.methods.cascade import Config, build
from qpeft.types import UNREADABLE, Candidates, Hit, Passage, Query, Ranking
from tiny_adapters import build as build_adapter
from tiny_adapters import with_store

TEXTS = (
    "the sky is blue",
    "the sea is salty",
    "an octopus in the sea of the long tide and the moon",
    "who was the old king",
    "the light of the sky",
    "red lion",
    "the new king of the city made a lake",
    "water",
    "the cat on the dog",
    "first year",
)
PASSAGES = tuple(Passage(f"p{i}", text) for i, text in enumerate(TEXTS))
ITEMS = [
    Candidates(Query("q1", "why is the sky blue?"), PASSAGES),
    Candidates(Query("q2", "who made the lake"), PASSAGES[::-1][:7]),
    Candidates(Query("q3", "salty water"), PASSAGES[2:5]),
]
CHEAP = ("first_stage", "passage_tokens=2", "layers=1")


@pytest.fixture(scope="module")
def lm(make_lm):
    return make_lm("qwen3")


def ids(ranking):
    return [hit.passage_id for hit in ranking.hits]


def cheap_order(lm, item, cheap):
    """Return the passage ids in the cheap score's order, by ways that know nothing of cascades."""
    name, _, number = cheap.partition("=")
    if name == "first_stage":
        return [passage.id for passage in item.passages]
    if name == "passage_tokens":
        (ranking,) = query_likelihood.build(query_likelihood.Config(max_passage_tokens=int(number)), lm).rerank([item])
        return ids(ranking)
    scorer = query_likelihood.build_scorer(query_likelihood.Config(), lm)
    rows = scorer.prepare([(item.query, passage) for passage in item.passages]).rows
    scores = [float(value.target.double().mean()) for value in lm.log_probs(rows, depth=int(number))]
    return ids(Ranking.from_scores("q", [(p.id, score) for p, score in zip(item.passages, scores, strict=True)]))


def by_hand(lm, item, sizes, cheap, **options):
    """Return what a cascade is: rank, cut, rank what is left."""
    first = [passage.id for passage in item.passages]
    left, below = first[: sizes[0]], first[sizes[0] :]
    for size, name in zip(sizes[1:], cheap, strict=True):
        passages = tuple(passage for passage in item.passages if passage.id in left)
        order = cheap_order(lm, Candidates(item.query, passages), name)
        left, below = order[:size], order[size:] + below
    passages = tuple(passage for passage in item.passages if passage.id in left)
    (full,) = query_likelihood.build(query_likelihood.Config(**options), lm).rerank([Candidates(item.query, passages)])
    return full.hits, ids(full) + below


@pytest.mark.parametrize("cheap", CHEAP)
@pytest.mark.parametrize("sizes", [(10, 3), (6, 2), (100, 9)])
def test_two_steps_equal_ranking_by_hand(lm, cheap, sizes):
    options = {"cascade": ":".join(map(str, sizes)), "cheap": cheap}
    rankings = list(build(Config(**options), lm).rerank(ITEMS))
    for item, ranking in zip(ITEMS, rankings, strict=True):
        hits, order = by_hand(lm, item, sizes, [cheap])
        assert ranking.query_id == item.query.id
        assert ids(ranking) == order
        assert [hit.score for hit in ranking.hits[: len(hits)]] == pytest.approx([hit.score for hit in hits], abs=1e-5)
        scores = [hit.score for hit in ranking.hits]
        assert scores == sorted(scores, reverse=True)
        assert len(set(scores)) == len(scores)


def test_three_steps_equal_ranking_by_hand(lm):
    rankings = build(Config(cascade="9:5:2", cheap="passage_tokens=2, layers=1"), lm).rerank(ITEMS)
    for item, ranking in zip(ITEMS, rankings, strict=True):
        assert ids(ranking) == by_hand(lm, item, (9, 5, 2), ["passage_tokens=2", "layers=1"])[1]


def test_the_first_stages_order_is_meant_in_a_later_step_too(lm):
    (ranking,) = build(Config(cascade="10:6:3", cheap="layers=1,first_stage"), lm).rerank(ITEMS[:1])
    kept = cheap_order(lm, ITEMS[0], "layers=1")[:6]
    assert sorted(ids(ranking)[:3]) == sorted(kept, key=lambda p: int(p[1:]))[:3]


@pytest.mark.parametrize("cheap", CHEAP)
def test_where_all_survive_nothing_is_scored_twice(lm, cheap):
    found = []
    for reranker in (
        query_likelihood.build(query_likelihood.Config(), lm),
        build(Config(cascade="11:10", cheap=cheap), lm),
    ):
        before = lm.computed.flops
        found.append((list(reranker.rerank(ITEMS)), reranker.counts, lm.computed.flops - before))
    assert found[0] == found[1]


@pytest.mark.parametrize("cheap", CHEAP)
def test_scores_do_not_depend_on_the_window(lm, cheap):
    options = {"cascade": "10:3", "cheap": cheap}
    alone, together = (list(build(Config(**options, queries_per_batch=n), lm).rerank(ITEMS)) for n in (1, 5))
    for one, other in zip(alone, together, strict=True):
        assert ids(one) == ids(other)
        assert [h.score for h in one.hits] == pytest.approx([h.score for h in other.hits], abs=1e-4)


def test_counts_and_work(lm):
    cascade = build(Config(cascade="10:3", cheap="passage_tokens=2", max_passage_tokens=6), lm)
    before = lm.computed.tokens
    list(cascade.rerank(ITEMS[:1]))
    full = query_likelihood.build(query_likelihood.Config(max_passage_tokens=6), lm)
    survivors = cheap_order(lm, ITEMS[0], "passage_tokens=2")[:3]
    cheap = query_likelihood.build(query_likelihood.Config(max_passage_tokens=2), lm)
    list(cheap.rerank(ITEMS[:1]))
    list(full.rerank([Candidates(ITEMS[0].query, tuple(p for p in PASSAGES if p.id in survivors))]))
    assert cascade.counts.pairs == 10
    assert cascade.counts.tokens == cheap.counts.tokens + full.counts.tokens
    assert cascade.counts.truncated_passages == full.counts.truncated_passages < cheap.counts.truncated_passages
    assert lm.computed.tokens - before > cascade.counts.tokens


def test_constant_scores_of_any_step_are_counted(lm):
    same = tuple(Passage(f"p{i}", text) for i, text in enumerate(["the sky is", "the sky was", "the sky", "the sky"]))
    cascade = build(Config(cascade="4:2", cheap="passage_tokens=2"), lm)
    list(cascade.rerank([Candidates(Query("q", "who"), same), Candidates(Query("r", "who"), PASSAGES)]))
    assert cascade.counts.constant_queries == 1


def test_an_empty_passage_does_not_survive(lm):
    passages = (Passage("none", ""), *PASSAGES[:4])
    for cheap in CHEAP[1:]:
        cascade = build(Config(cascade="5:4", cheap=cheap), lm)
        (ranking,) = cascade.rerank([Candidates(ITEMS[0].query, passages)])
        assert ids(ranking)[-1] == "none"
        assert cascade.counts.empty_passages == 0
    cascade = build(Config(cascade="5:2", cheap="first_stage"), lm)
    (ranking,) = cascade.rerank([Candidates(ITEMS[0].query, passages)])
    assert ids(ranking)[1] == "none"
    assert cascade.counts.empty_passages == 1


def test_what_cannot_be_read_is_told_wherever_it_fell_out(lm):
    texts = ["", *(passage.text for passage in PASSAGES[:4])]
    query = ITEMS[0].query.text
    for options in ({"cheap": CHEAP[1]}, {"cheap": "first_stage"}):
        cascade = build(Config(cascade="5:3", **options), lm)
        for entry in cascade.rank(query, texts):
            assert (entry["score"] == UNREADABLE) == (entry["corpus_id"] == 0)


@pytest.mark.parametrize("cheap", CHEAP[1:])
def test_kept_contexts_do_not_change_rankings(lm, cheap):
    options = Config(cascade="10:4", cheap=cheap)
    stored = with_store(lm)
    reranker = build(options, stored)
    for _ in range(2):
        for one, other in zip(reranker.rerank(ITEMS), build(options, lm).rerank(ITEMS), strict=True):
            assert ids(one) == ids(other)
    # ten passages in cheap and in full at most, each once
    assert stored.store.misses <= 20
    assert stored.store.hits > stored.store.misses


@pytest.mark.parametrize("cheap", CHEAP)
@pytest.mark.parametrize("name", ["qpeft_a", "qpeft_c", "lora"])
def test_adapters_write_in_every_step(make_lm, tmp_path, name, cheap):
    from qpeft.adapters._folder import save_adapter
    from qpeft.template import load_template

    if name == "lora":
        pytest.importorskip("peft")
    lm = make_lm("llama")
    options = {"layer": 0} if name == "qpeft_c" else {}
    save_adapter(tmp_path / "a", name, build_adapter(name, lm, trained=True, **options), lm, load_template("qpeft"))
    adapter = str(tmp_path / "a")
    reranker = build(Config(cascade="10:3", cheap=cheap, adapter=adapter), lm)
    hinted = query_likelihood.build(query_likelihood.Config(adapter=adapter), lm)
    assert reranker.facts["adapter"] == hinted.facts["adapter"]
    (ranking,) = reranker.rerank(ITEMS[:1])
    scores = {hit.passage_id: hit.score for hit in next(hinted.rerank(ITEMS[:1])).hits}
    assert [hit.score for hit in ranking.hits[:3]] == pytest.approx([scores[p] for p in ids(ranking)[:3]], abs=1e-4)
    if cheap != "first_stage":
        cheap_hinted = reranker._steps[1].reranker._scorer
        assert cheap_hinted.adapter is reranker._full._scorer.adapter


def test_every_family_takes_layers(family, make_lm):
    lm = make_lm(family)
    plain = query_likelihood.build(query_likelihood.Config(), lm)
    before = list(plain.rerank(ITEMS))
    for item, ranking in zip(ITEMS, build(Config(cascade="10:3", cheap="layers=1"), lm).rerank(ITEMS), strict=True):
        assert ids(ranking) == by_hand(lm, item, (10, 3), ["layers=1"])[1]
    assert list(plain.rerank(ITEMS)) == before


def test_encoder_decoders_take_all_but_layers(t5):
    for cheap in CHEAP[:2]:
        options = {"template": "upr"}
        (ranking,) = build(Config(cascade="10:3", cheap=cheap, **options), t5).rerank(ITEMS[:1])
        (full,) = query_likelihood.build(query_likelihood.Config(**options), t5).rerank(ITEMS[:1])
        assert ids(ranking)[:3] == [p for p in ids(full) if p in ids(ranking)[:3]]
    with pytest.raises(OptionError, match="only decoder-only models"):
        build(Config(cheap="layers=1"), t5)


def test_windows_are_for_the_full_score(lm):
    options = {"windows": 4, "window_overlap": 1}
    (ranking,) = build(Config(cascade="10:3", cheap="passage_tokens=2", **options), lm).rerank(ITEMS[:1])
    assert ids(ranking) == by_hand(lm, ITEMS[0], (10, 3), ["passage_tokens=2"], **options)[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cascade": "20:100"}, "--cascade 20:100: each number must be below"),
        ({"cascade": "20:20"}, "--cascade 20:20: each number must be below"),
        ({"cascade": "20:0"}, "--cascade 20:0: each number must be below"),
        ({"cascade": "20"}, "--cascade 20: write two numbers or more"),
        ({"cascade": "20:-1"}, "--cascade 20:-1: write two"),
        ({"cascade": "a:b"}, "--cascade a:b: write two"),
        ({"cascade": "100:40:10"}, "--cascade 100:40:10 needs 2 cheap scores; --cheap has 1"),
        ({"cheap": "first_stage,layers=1"}, "--cascade 100:20 needs 1 cheap scores; --cheap has 2"),
        ({"cheap": "layer=1"}, "unknown score 'layer'; did you mean 'layers'"),
        ({"cheap": "layers"}, "--cheap layers: write a number of at least 1"),
        ({"cheap": "layers=x"}, "--cheap layers=x: write a number"),
        ({"cheap": "passage_tokens=0"}, "--cheap passage_tokens=0: write a number of at least 1"),
        ({"cheap": "first_stage=3"}, "first_stage takes no number"),
        ({"cheap": "layers=2"}, "layers=2: tiny-qwen3 has 2 layers; take from 1 to 1"),
        ({"cheap": "layers=9"}, "layers=9: tiny-qwen3 has 2 layers"),
        ({"queries_per_batch": 0}, "--queries-per-batch is 0"),
    ],
)
def test_options_that_make_no_sense(lm, options, message):
    with pytest.raises(OptionError, match=message):
        build(Config(**options), lm)


def test_an_adapter_that_reads_deeper_states_is_refused(make_lm, tmp_path):
    from qpeft.adapters._folder import save_adapter
    from qpeft.template import load_template

    lm = make_lm("llama")
    save_adapter(tmp_path / "c", "qpeft_c", build_adapter("qpeft_c", lm), lm, load_template("qpeft"))
    build(Config(cheap="passage_tokens=2", adapter=str(tmp_path / "c")), lm)
    with pytest.raises(OptionError, match="layers=1: the adapter reads states of layer 2"):
        build(Config(cheap="layers=1", adapter=str(tmp_path / "c")), lm)


def test_nothing_of_the_model_changes(lm):
    before = {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}
    modules = list(lm.model.named_modules())
    list(build(Config(cascade="10:3", cheap="layers=1"), lm).rerank(ITEMS))
    assert list(lm.model.named_modules()) == modules
    assert all(torch.equal(before[name], tensor) for name, tensor in lm.model.state_dict().items())


def test_ranks_of_hits_that_fell_out_stay_below_by_their_scores(lm):
    (ranking,) = build(Config(cascade="10:3", cheap="first_stage"), lm).rerank(ITEMS[:1])
    lowest = ranking.hits[2].score
    assert ranking.hits[3:] == tuple(Hit(f"p{i}", pytest.approx(lowest - i + 2)) for i in range(3, 10))


def test_constant_scores_of_the_last_step_are_counted(lm):
    passages = (Passage("a", "the sky"), Passage("b", "the sky"), Passage("c", "red lion"))
    cascade = build(Config(cascade="3:2", cheap="first_stage"), lm)
    (ranking,) = cascade.rerank([Candidates(Query("q", "who"), passages)])
    assert ids(ranking)[2] == "c"
    assert cascade.counts.constant_queries == 1
