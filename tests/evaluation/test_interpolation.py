import numpy as np
import pytest

from qpeft.errors import OptionError, ScoreError
from qpeft.evaluation.interpolation import choose_weight, interpolate
from qpeft.evaluation.measures import evaluate
from qpeft.types import Ranking, Run

FIRST = {"a": 9.0, "b": 6.0, "c": 3.0, "d": 2.0, "e": 1.0}
RERANKED = {"a": -3.0, "b": -1.0, "c": -2.0}


def run(tag, **rankings):
    return Run([Ranking.from_scores(query_id, scores.items()) for query_id, scores in rankings.items()], tag)


def order(found, query_id="q"):
    return [hit.passage_id for hit in found[query_id].hits]


def test_by_hand():
    z = 1 / np.std([1.0, 2.0, 3.0])
    found = interpolate(run("first", q=FIRST), run("reranked", q=RERANKED), 0.25)
    # standardised: first a +z, b 0, c −z; reranked a −z, b +z, c 0
    expected = {"b": 0.75 * z, "c": -0.25 * z, "a": -0.5 * z}
    assert order(found) == ["b", "c", "a", "d", "e"]
    assert [hit.score for hit in found["q"].hits[:3]] == pytest.approx(list(expected.values()))
    assert found.tag == "reranked+0.25*first"


def test_the_ends_are_the_two_runs():
    first, reranked = run("first", q=FIRST), run("reranked", q=RERANKED)
    assert order(interpolate(first, reranked, 0)) == ["b", "c", "a", "d", "e"]
    assert order(interpolate(first, reranked, 1)) == ["a", "b", "c", "d", "e"]


def test_equal_scores_have_no_say():
    first, flat = run("first", q=FIRST), run("flat", q={"b": 0.0, "c": 1.0})
    equal = Run([Ranking("q", tuple(flat["q"].hits))], "flat")
    assert order(interpolate(run("first", q={"a": 2.0, "b": 1.0, "c": 0.5}), equal, 0.0)) == ["c", "b", "a"]
    same = Run([Ranking.from_scores("q", [("b", 1.0)])], "single")
    assert order(interpolate(first, same, 0.3)) == ["b", "a", "c", "d", "e"]


def test_opposite_orders_cancel_out_without_a_warning():
    found = interpolate(run("first", q={"a": 1.0, "b": 2.0}), run("reranked", q={"a": 2.0, "b": 1.0}), 0.5)
    assert [hit.score for hit in found["q"].hits] == [0.0, 0.0]


def test_depth_keeps_the_tail_that_the_reranked_run_carries_along():
    carried = RERANKED | {"d": -100.0, "e": -101.0}
    first, reranked = run("first", q=FIRST), run("reranked", q=carried)
    cut = interpolate(first, reranked, 0.25, depth=3)
    assert cut["q"] == interpolate(first, run("reranked", q=RERANKED), 0.25)["q"]
    assert interpolate(first, reranked, 0.25)["q"] != cut["q"]


def test_queries_that_only_the_first_stage_ranks_stay_as_they_are():
    first = run("first", q=FIRST, other=FIRST)
    assert interpolate(first, run("reranked", q=RERANKED), 0.5)["other"] == first["other"]


def test_what_does_not_belong_together_is_refused():
    first = run("first", q=FIRST)
    with pytest.raises(ScoreError, match="passage 'z'"):
        interpolate(first, run("reranked", q={"z": 1.0}), 0.5)
    with pytest.raises(ScoreError, match="query 'x'"):
        interpolate(first, run("reranked", x=RERANKED), 0.5)
    with pytest.raises(OptionError, match=r"weight is 1\.5"):
        interpolate(first, first, 1.5)
    with pytest.raises(OptionError, match="depth is 0"):
        interpolate(first, first, 0.5, depth=0)


def test_the_best_weight_on_dev_is_chosen_and_the_curve_returned():
    rng = np.random.default_rng(0)
    queries = [f"q{number}" for number in range(40)]
    passages = [f"p{number}" for number in range(20)]
    qrels = {query_id: {"p0": 1} for query_id in queries}

    def noisy(tag):
        scores = {
            query_id: {p: float(rng.normal(1.0 if p == "p0" else 0.0, 1.0)) for p in passages} for query_id in queries
        }
        return run(tag, **scores)

    first, reranked = noisy("first"), noisy("reranked")
    choice = choose_weight(first, reranked, qrels, "RR@10")
    assert [weight for weight, _ in choice.curve] == pytest.approx(np.arange(0, 1.01, 0.05))
    assert choice.curve[0][1] == evaluate(reranked, qrels, "RR@10").means["RR@10"]
    assert choice.curve[-1][1] == evaluate(first, qrels, "RR@10").means["RR@10"]
    best = max(mean for _, mean in choice.curve)
    assert dict(choice.curve)[choice.weight] == pytest.approx(best)
    assert 0 < choice.weight < 1
    chosen = interpolate(first, reranked, choice.weight)
    assert evaluate(chosen, qrels, "RR@10").means["RR@10"] == pytest.approx(best)


def test_the_smaller_of_equally_good_weights_is_chosen():
    first, reranked = run("first", q=FIRST), run("reranked", q=RERANKED)
    choice = choose_weight(first, reranked, {"q": {"a": 1, "b": 1, "c": 1}}, "P@3", weights=(1.0, 0.5, 0.2))
    assert choice.weight == 0.2
    assert choice.curve == ((0.2, 1.0), (0.5, 1.0), (1.0, 1.0))
    with pytest.raises(OptionError, match="one measure"):
        choose_weight(first, reranked, {"q": {"a": 1}}, "P@3 RR")
    with pytest.raises(OptionError, match="no value"):
        choose_weight(first, reranked, {"q": {"z": 1}}, "CandR_clean@3")
    with pytest.raises(OptionError, match="no weight"):
        choose_weight(first, reranked, {"q": {"a": 1}}, "RR", weights=())


def test_weights_that_differ_by_rounding_alone_are_equally_good():
    others = [f"p{number}" for number in range(1, 11)]

    def at(rank):
        return {passage: -float(i) for i, passage in enumerate([*others[: rank - 1], "p0", *others[rank - 1 :]])}

    first, reranked = run("first", a=at(11), b=at(1), c=at(6)), run("reranked", a=at(2), b=at(3), c=at(3))
    choice = choose_weight(first, reranked, {query: {"p0": 1} for query in "abc"}, "RR@10", weights=(0.0, 1.0))
    assert choice.curve[0][1] < choice.curve[1][1] == pytest.approx(7 / 18), "by rounding"
    assert choice.weight == 0.0
