import itertools

import pytest
import torch

from qpeft import methods
from qpeft.errors import OptionError, QueryError, ScoreError
from qpeft.lm.read_out import Head
from qpeft.types import Candidates, Passage, Query

TEXTS = ["the sky is blue", "", "éàü ✓ 水", "the sea " * 400, "the sky is blue", "who was the old king", "."]
FAMILIES = ["llama", "gpt2", "bert"]
SCORERS = [method for method in map(methods.load, methods.available()) if hasattr(method, "build_scorer")]


def candidates(query_id="q", text="why is the sky blue?", texts=TEXTS):
    return Candidates(Query(query_id, text), tuple(Passage(f"p{i}", text) for i, text in enumerate(texts)))


@pytest.fixture(params=methods.available())
def method(request):
    return methods.load(request.param)


@pytest.fixture(params=FAMILIES)
def lm(request, make_lm):
    made = make_lm(request.param)
    made.head = Head(torch.nn.Linear(32, 1, bias=False).requires_grad_(False))
    return made


def build(method, lm, **options):
    return method.build(method.Config(**options), lm)


def test_one_ranking_per_query_in_order_with_each_passage_once(method, lm):
    items = [candidates("b"), candidates("a", "who"), candidates("c", texts=TEXTS[:2])]
    rankings = list(build(method, lm).rerank(items))
    assert [ranking.query_id for ranking in rankings] == ["b", "a", "c"]
    for item, ranking in zip(items, rankings, strict=True):
        assert sorted(hit.passage_id for hit in ranking.hits) == [passage.id for passage in item.passages]
        assert [hit.score for hit in ranking.hits] == sorted((hit.score for hit in ranking.hits), reverse=True)
        assert not ranking.constant


def test_rankings_come_lazily(method, lm):
    def endless():
        for number in itertools.count():
            assert number < 10, "reads ahead"
            yield candidates(str(number))

    rankings = build(method, lm, queries_per_batch=1).rerank(endless())
    assert [ranking.query_id for ranking in itertools.islice(rankings, 2)] == ["0", "1"]


@pytest.mark.parametrize("method", SCORERS, ids=lambda method: method.__name__)
def test_a_scorer_with_another_adapter_counts_for_itself(method, lm):
    item = candidates()
    scorer = method.build_scorer(method.Config(), lm)
    facts, other = dict(scorer.facts), scorer.using(None)
    assert other.score([(item.query, passage) for passage in item.passages])
    assert (scorer.counts.pairs, other.counts.pairs) == (0, len(TEXTS))
    assert (scorer.facts, other.facts) == (facts, {})


def test_no_candidates_give_an_empty_ranking(method, lm):
    (ranking,) = build(method, lm).rerank([candidates(texts=[])])
    assert ranking.hits == ()
    assert list(build(method, lm).rerank([])) == []


def test_equal_texts_get_equal_scores(method, lm):
    (ranking,) = build(method, lm).rerank([candidates()])
    scores = {hit.passage_id: hit.score for hit in ranking.hits}
    assert scores["p0"] == pytest.approx(scores["p4"], abs=1e-5)


@pytest.mark.parametrize("window", [1, 2, 5])
def test_scores_do_not_depend_on_company(method, lm, window):
    items = [candidates(str(i), text) for i, text in enumerate(["why", "who was it", "the moon", "sea?", "lion"])]
    together = build(method, lm, queries_per_batch=window).rerank(items)
    for item, ranking in zip(items, together, strict=True):
        scores = {hit.passage_id: hit.score for hit in ranking.hits}
        for passage in item.passages:
            if passage.text:
                (alone,) = build(method, lm).rerank([Candidates(item.query, (passage,))])
                assert alone.hits[0].score == pytest.approx(scores[passage.id], abs=1e-4)


def test_the_same_passage_twice_is_an_error(method, lm):
    passage = Passage("p", "the sky")
    with pytest.raises(ScoreError, match="'p' occurs twice"):
        list(build(method, lm).rerank([Candidates(Query("q", "why"), (passage, passage))]))


def test_an_empty_query_is_an_error(method, lm):
    with pytest.raises(QueryError, match="'q7'"):
        list(build(method, lm).rerank([candidates("q7", " ")]))


def test_the_model_is_left_as_it_was(method, lm):
    before = {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}
    list(build(method, lm).rerank([candidates()]))
    assert all(torch.equal(before[name], tensor) for name, tensor in lm.model.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in lm.model.parameters())


def test_unknown_method():
    with pytest.raises(OptionError, match="did you mean 'query_likelihood'"):
        methods.load("query-likelyhood")
