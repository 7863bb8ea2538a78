"""Calibrations against closed forms, a naive reference, and data whose probabilities are known."""

import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qpeft.errors import FormatError, InputError, OptionError, ScoreError, UnknownIdError
from qpeft.evaluation.calibration import (
    Isotonic,
    JudgedPairs,
    Platt,
    brier,
    expected_calibration_error,
    fit,
    folds,
    judged_pairs,
    keep,
    out_of_fold,
    reliability,
    separation,
)
from qpeft.evaluation.calibration_file import Calibration, ScoreOrigin, read_calibration, write_calibration
from qpeft.types import UNREADABLE, Passage, Ranking, Run

SCORES = st.lists(st.tuples(st.floats(-1e6, 1e6, width=32), st.booleans()), min_size=2, max_size=40).filter(
    lambda pairs: len({relevant for _, relevant in pairs}) == 2
)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def drawn(slope, intercept, queries=400, candidates=20, difficulty=0.0, seed=0):
    """Return pairs with labels drawn by sigmoid(slope · s + intercept); s is then shifted by a query's difficulty."""
    rng = np.random.default_rng(seed)
    query = np.repeat(np.arange(queries), candidates)
    scores = rng.normal(-4, 1, queries * candidates)
    relevant = rng.random(len(scores)) < sigmoid(slope * scores + intercept)
    return JudgedPairs(scores + difficulty * rng.normal(size=queries)[query], relevant, query)


# The two maps


def test_platt_finds_the_curve_that_made_the_labels():
    pairs = drawn(2.0, 6.0, queries=5000)
    fitted = fit("platt", pairs.scores, pairs.relevant)
    assert fitted.slope == pytest.approx(2.0, rel=0.03)
    assert fitted.intercept == pytest.approx(6.0, rel=0.03)
    assert fitted([-3.0]) == pytest.approx([sigmoid(0.0)], abs=0.01)


def test_platt_is_at_the_minimum_of_its_smoothed_loss():
    scores, relevant = np.array([-5.0, -4.0, -3.0, -2.0, -1.0]), np.array([0, 0, 1, 0, 1], bool)
    fitted = fit("platt", scores, relevant)
    targets = np.where(relevant, 3 / 4, 1 / 5)  # (n₊ + 1)/(n₊ + 2), 1/(n₋ + 2)
    error = fitted(scores) - targets
    assert error.sum() == pytest.approx(0, abs=1e-6)
    assert (error * scores).sum() == pytest.approx(0, abs=1e-6)


def test_two_scores_have_a_closed_form():
    fitted = fit("platt", [0.0] * 4 + [1.0] * 4, [0, 0, 0, 1, 0, 1, 1, 1])
    # At each score the curve goes through the mean of the smoothed labels: n₊ = n₋ = 4, so 5/6 and 1/6.
    assert fitted([0.0, 1.0]) == pytest.approx([(3 * 1 / 6 + 5 / 6) / 4, (3 * 5 / 6 + 1 / 6) / 4], abs=1e-6)


def test_separable_labels_give_a_finite_curve():
    fitted = fit("platt", [-9.0, -8.0, -1.0, 0.0], [False, False, True, True])
    assert 0.5 < fitted([0.0])[0] < 1
    assert math.isfinite(fitted.slope)


def test_platt_knows_no_falling_curve():
    fitted = fit("platt", [-1.0, -2.0, -8.0, -9.0], [False, False, True, True])
    assert fitted.slope == 0
    assert fitted.constant
    assert fitted([-9.0, 5.0]) == pytest.approx([0.5, 0.5], abs=1e-6)


def test_isotonic_by_hand():
    fitted = fit("isotonic", [1.0, 2.0, 3.0, 4.0, 5.0], [False, True, False, True, True])
    # 2 and 3 are out of order and share their mean; what lies between the steps is on a line.
    assert fitted([0.0, 1.0, 1.5, 2.0, 2.7, 3.0, 3.5, 4.0, 9.0]) == pytest.approx(
        [0, 0, 0.25, 0.5, 0.5, 0.5, 0.75, 1, 1]
    )


def naive_isotonic(scores, relevant):
    """Return max over lower sets of min over upper sets of the mean: the textbook's formula, in cubic time."""
    order = np.argsort(scores, kind="stable")
    points = np.unique(scores)
    means = {
        (a, b): relevant[(scores >= points[a]) & (scores <= points[b])].mean()
        for a in range(len(points))
        for b in range(a, len(points))
    }
    fitted = [max(min(means[a, b] for b in range(i, len(points))) for a in range(i + 1)) for i in range(len(points))]
    assert len(order) == len(scores)
    return points, np.array(fitted)


@given(SCORES)
def test_isotonic_equals_the_max_min_formula(pairs):
    scores, relevant = np.array([s for s, _ in pairs]), np.array([r for _, r in pairs])
    points, expected = naive_isotonic(scores, relevant)
    assert fit("isotonic", scores, relevant)(points) == pytest.approx(expected, abs=1e-9)


def test_equal_scores_get_one_probability():
    fitted = fit("isotonic", [1.0, 1.0, 1.0, 2.0], [False, True, False, True])
    assert fitted([1.0]) == pytest.approx([1 / 3])


@pytest.mark.parametrize("method", ["platt", "isotonic"])
@given(pairs=SCORES, asked=st.lists(st.floats(-1e7, 1e7), min_size=2, max_size=20))
def test_calibrations_never_fall(method, pairs, asked):
    fitted = fit(method, [s for s, _ in pairs], [r for _, r in pairs])
    asked = sorted([*asked, *(s for s, _ in pairs)])
    values = fitted(asked)
    assert ((values >= 0) & (values <= 1)).all()
    # The last bit of a logistic function is the library's.
    assert (np.diff(values) >= (0 if method == "isotonic" else -1e-15)).all()


def test_rounding_carries_no_line_past_its_end():
    rng = np.random.default_rng(0)
    for _ in range(2000):
        scores, probabilities = np.sort(rng.normal(size=2)), np.sort(rng.random(2))
        below = np.nextafter(scores[1], -9)
        asked = [np.nextafter(below, -9), below, scores[1]]
        assert (np.diff(Isotonic(tuple(scores), tuple(probabilities))(asked)) >= 0).all()


@pytest.mark.parametrize("method", ["platt", "isotonic"])
def test_what_cannot_be_fitted(method):
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(ScoreError, match="NaN or infinite"):
            fit(method, [0.0, bad], [True, False])
        with pytest.raises(ScoreError, match="NaN or infinite"):
            fit(method, [0.0, 1.0], [False, True])([bad])
    for one in ([True, True], [False, False]):
        with pytest.raises(ScoreError, match="only one kind"):
            fit(method, [0.0, 1.0], one)
    with pytest.raises(OptionError, match="unknown calibration 'isotone'; did you mean 'isotonic'"):
        fit("isotone", [0.0, 1.0], [True, False])


@pytest.mark.parametrize("parameters", [(math.nan, 0.0), (1.0, math.inf), (-0.1, 0.0)])
def test_a_logistic_curve_rises(parameters):
    with pytest.raises(ScoreError):
        Platt(*parameters)


@pytest.mark.parametrize(
    "points",
    [
        ((), ()),
        ((0.0,), (0.1, 0.2)),
        ((0.0, 0.0), (0.1, 0.2)),
        ((1.0, 0.0), (0.1, 0.2)),
        ((0.0, 1.0), (0.2, 0.1)),
        ((0.0, 1.0), (-0.1, 0.2)),
        ((0.0, 1.0), (0.1, 1.2)),
        ((0.0, math.nan), (0.1, 0.2)),
        ((0.0, 1.0), (0.1, math.nan)),
    ],
)
def test_steps_rise(points):
    with pytest.raises(ScoreError):
        Isotonic(*points)


# Pairs


def run(**rankings):
    return Run([Ranking.from_scores(query_id, scores.items()) for query_id, scores in rankings.items()], "ql")


def test_pairs_of_a_run():
    made = run(q1={"a": -1.0, "b": -2.0, "below": -3.0}, q2={"c": -5.0})
    pairs = judged_pairs(made, {"q1": {"b": 2, "a": 0, "below": 1}, "q2": {}, "q3": {"z": 1}}, depth=2)
    assert pairs.scores.tolist() == [-1.0, -2.0, -5.0]
    assert pairs.relevant.tolist() == [False, True, False]
    assert (pairs.queries, pairs.answerable) == (2, 1)
    assert pairs.centred().scores.tolist() == [0.5, -0.5, 0.0]


def test_what_no_model_could_read_takes_no_part():
    read = {"c": -5.0, "d": -6.0}
    made = run(q1={"a": -1e6}, q2=read | {"b": -7.0})
    texts = {
        "a": Passage("a", " \n"),
        "b": Passage("b", "", " "),
        "c": Passage("c", "text"),
        "d": Passage("d", "", "title"),
    }
    qrels = {"q1": {"a": 1}, "q2": {"c": 1}}
    marked = Run([dataclasses.replace(each, unreadable=frozenset("ab")) for each in made.values()], "ql")
    for pairs in judged_pairs(made, qrels, passages=texts), judged_pairs(marked, qrels):
        assert pairs.scores.tolist() == [-5.0, -6.0]
        assert (pairs.queries, pairs.answerable) == (1, 1)
        assert pairs.centred().scores.tolist() == [0.5, -0.5]


@pytest.mark.parametrize("centred", [False, True])
def test_what_no_model_could_read_is_not_relevant_and_changes_no_other(centred):
    made = Calibration(Platt(1.0, 0.0), None, centred)
    alone = made([-1.0, -2.0])
    assert made([-1.0, UNREADABLE, -2.0]) == [alone[0], 0.0, alone[1]]
    assert made([UNREADABLE]) == [0.0]
    with pytest.raises(ScoreError, match="are a list"):
        made([[-1.0, -2.0], [-3.0, -4.0]])


def test_runs_that_cannot_be_calibrated():
    made = run(q1={"a": -1.0, "b": -2.0})
    with pytest.raises(UnknownIdError, match="run 'ql': query 'q1' has no judgements"):
        judged_pairs(made, {"q2": {"a": 1}})
    with pytest.raises(ScoreError, match="no candidate is relevant"):
        judged_pairs(made, {"q1": {"a": 0, "elsewhere": 1}})
    with pytest.raises(ScoreError, match="all candidates are relevant"):
        judged_pairs(made, {"q1": {"a": 1, "b": 1}})


# What it is worth


def test_a_query_is_in_one_fold_and_answerable_ones_are_spread():
    pairs = drawn(2.0, 3.0, queries=53)
    fold = folds(pairs, 5, seed=3)
    for number in np.unique(pairs.query):
        assert len(set(fold[pairs.query == number])) == 1
    answerable = np.unique(pairs.query[pairs.relevant])
    counts = np.bincount([fold[pairs.query == number][0] for number in answerable], minlength=5)
    assert counts.max() - counts.min() <= 1
    assert (folds(pairs, 5, seed=3) == fold).all()
    assert (folds(pairs, 5, seed=4) != fold).any()


def test_too_few_queries_for_the_folds():
    pairs = judged_pairs(run(q1={"a": 1.0, "b": 0.0}, q2={"c": 0.0}), {"q1": {"a": 1}, "q2": {}})
    with pytest.raises(OptionError, match="--folds is 5, but only 1 queries have"):
        folds(pairs, 5)
    with pytest.raises(OptionError, match="--folds is 1"):
        folds(pairs, 1)


@pytest.mark.parametrize("method", ["platt", "isotonic"])
def test_nothing_of_a_fold_is_used_for_it(method):
    pairs = drawn(2.0, 5.0, queries=40)
    fold = folds(pairs, 4)
    before = out_of_fold(method, pairs, fold)
    changed = dataclasses.replace(pairs, relevant=np.where(fold == 1, ~pairs.relevant, pairs.relevant))
    after = out_of_fold(method, changed, fold)
    assert (before[fold == 1] == after[fold == 1]).all()
    assert (before[fold != 1] != after[fold != 1]).any()


def test_the_base_rate_is_that_of_the_other_folds():
    pairs = drawn(2.0, 5.0, queries=40)
    fold = folds(pairs, 2)
    assert (out_of_fold(None, pairs, fold)[fold == 0] == pairs.relevant[fold == 1].mean()).all()


def test_cross_validation_is_near_what_the_true_probabilities_reach():
    pairs = drawn(2.0, 5.0, queries=800)
    truth = sigmoid(2.0 * pairs.scores + 5.0)
    for method in ("platt", "isotonic"):
        found = out_of_fold(method, pairs, folds(pairs, 5))
        assert brier(found, pairs.relevant) == pytest.approx(brier(truth, pairs.relevant), rel=0.02)
        assert np.abs(found - truth).mean() < 0.02
        assert expected_calibration_error(found, pairs.relevant) < 0.01
        for threshold in (0.1, 0.5):
            kept = keep(threshold, found, pairs, folds(pairs, 5))
            assert kept.precision == pytest.approx(kept.promised, abs=0.04)
            assert kept.recall == pytest.approx((truth[pairs.relevant] >= threshold).mean(), abs=0.05)
    worthless = dataclasses.replace(pairs, scores=np.random.default_rng(1).normal(size=len(pairs.scores)))
    base = brier(out_of_fold(None, pairs, folds(pairs, 5)), pairs.relevant)
    assert brier(out_of_fold("platt", worthless, folds(pairs, 5)), pairs.relevant) == pytest.approx(base, rel=0.01)


def test_centring_takes_the_querys_difficulty_out():
    pairs = drawn(2.0, 5.0, difficulty=4.0)
    within, across = separation(pairs)
    assert within > 0.85
    assert across < 0.7
    assert separation(pairs.centred())[0] == within
    assert separation(pairs.centred())[1] > 0.85
    raw = brier(out_of_fold("platt", pairs, folds(pairs, 5)), pairs.relevant)
    assert brier(out_of_fold("platt", pairs.centred(), folds(pairs, 5)), pairs.relevant) < 0.8 * raw


def test_separation_by_hand():
    made = run(q1={"a": 3.0, "b": 2.0, "c": 1.0}, q2={"d": 9.0, "e": 9.0})
    pairs = judged_pairs(made, {"q1": {"b": 1}, "q2": {"e": 1}})
    within, across = separation(pairs)
    assert within == pytest.approx((0.5 + 0.5) / 2)  # b above c, below a; e and d tie
    assert across == pytest.approx((1 + 0 + 0 + 1 + 1 + 0.5) / 6)
    more = run(q1={"a": 3.0, "b": 2.0}, all={"f": 1.0, "g": 0.0})
    assert separation(judged_pairs(more, {"q1": {"a": 1}, "all": {"f": 1, "g": 1}}))[0] == 1.0, "nothing to tell apart"


def test_errors_by_hand():
    probabilities, relevant = np.array([0.1, 0.1, 0.9, 0.9]), np.array([False, True, True, True])
    assert brier(probabilities, relevant) == pytest.approx((0.01 + 0.81 + 0.01 + 0.01) / 4)
    low, high = reliability(probabilities, relevant)
    assert (low.pairs, low.promised, low.relevant) == (2, pytest.approx(0.1), 0.5)
    assert (high.pairs, high.promised, high.relevant) == (2, pytest.approx(0.9), 1.0)
    assert expected_calibration_error(probabilities, relevant) == pytest.approx((0.4 + 0.1) / 2)


def test_bins_hold_about_a_tenth_each():
    values = np.linspace(0, 1, 200)
    assert [each.pairs for each in reliability(values, values > 0.5)] == [20] * 10
    (single,) = reliability(np.full(50, 0.25), np.arange(50) % 4 == 0)
    assert (single.pairs, single.promised, single.relevant) == (50, 0.25, 0.26)


def test_what_a_threshold_keeps_by_hand():
    pairs = judged_pairs(
        run(q1={"a": 3.0, "b": 2.0, "c": 1.0}, q2={"d": 9.0, "e": 4.0}), {"q1": {"b": 1}, "q2": {"d": 1}}
    )
    fold, probabilities = np.array([0, 0, 0, 1, 1]), np.array([0.6, 0.5, 0.1, 0.9, 0.2])
    kept = keep(0.5, probabilities, pairs, fold)
    assert kept.per_query == 1.5
    assert kept.promised == pytest.approx(2.0 / 3)
    assert kept.precision == pytest.approx(2 / 3)
    assert kept.range == (0.5, 1.0)
    assert kept.recall == 1.0
    nothing = keep(0.95, probabilities, pairs, fold)
    assert (nothing.per_query, nothing.promised, nothing.precision, nothing.recall) == (0.0, None, None, 0.0)


# The file

ORIGIN = ScoreOrigin.of(
    {"name": "tiny-lm", "revision": None, "sha256": "a" * 64, "dtype": "float32"},
    {"template": {"name": "plain", "version": 1, "fingerprint": "b" * 64}},
    "query_likelihood",
    {"template": None, "adapter": None, "normalize": "mean", "windows": 0, "queries_per_batch": 4},
)


@pytest.mark.parametrize("made", [Platt(1.5, 2.25), Isotonic((-3.0, -1.0, 0.5), (0.0, 0.25, 1.0))])
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("origin", [ORIGIN, None])
def test_a_file_reads_back_as_it_was(tmp_path, made, centred, origin):
    calibration = Calibration(made, origin, centred, {"command": "rerank", "queries": 3}, {"folds": 5})
    write_calibration(calibration, tmp_path / "deep" / "calibration.json")
    assert read_calibration(tmp_path / "deep" / "calibration.json") == calibration
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["calibration.json"]


def test_calibrated_scores():
    made = Platt(2.0, 1.0)
    assert Calibration(made, ORIGIN)([-1.0, 0.0]) == pytest.approx([sigmoid(-1.0), sigmoid(1.0)])
    assert Calibration(made, ORIGIN, centred=True)([-1.0, 0.0]) == pytest.approx([sigmoid(0.0), sigmoid(2.0)])
    assert Calibration(made, ORIGIN, centred=True)([]) == []
    with pytest.raises(ScoreError):
        Calibration(made, ORIGIN)([-1.0, math.inf])


@pytest.mark.parametrize(
    "change",
    [
        "[]",
        "{}",
        '{"qpeft_calibration": 2}',
        '{"qpeft_calibration": 1}',
        {"method": "platts"},
        {"parameters": {"slope": -1.0, "intercept": 0.0}},
        {"parameters": {"slope": "steep", "intercept": 0.0}},
        {"parameters": {"slope": 1.0}},
        {"parameters": [1.0]},
        {"origin": {"model": {}}},
        {"origin": "tiny-lm"},
    ],
)
def test_files_that_are_no_calibration(tmp_path, change):
    path = tmp_path / "calibration.json"
    write_calibration(Calibration(Platt(1.0, 0.0), ORIGIN), path)
    path.write_text(change if isinstance(change, str) else json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(FormatError, match=r"calibration\.json: not a calibration of qpeft") as caught:
        read_calibration(path)
    assert "\n" not in str(caught.value)


def other(**changes):
    return dataclasses.replace(ORIGIN, **changes)


def test_it_is_used_with_what_it_was_fitted_on():
    calibration = Calibration(Platt(1.0, 0.0), ORIGIN)
    calibration.check(ORIGIN)
    calibration.check(other(model={"name": "a copy", "revision": None, "sha256": "a" * 64}))
    calibration.check(other(options={"method": "query_likelihood", "younger": 3}))


@pytest.mark.parametrize(
    ("origin", "words"),
    [
        (
            other(model={"name": "big", "sha256": "c" * 64}),
            r"of model 'tiny-lm' \(aaaaaaaaaaaa\), not of 'big' \(cccccc",
        ),
        (other(model={"name": "big", "sha256": None}), r"of model 'tiny-lm', not of 'big'$"),
        (other(template={"name": "upr", "fingerprint": "c" * 64}), r"of template 'plain' \(b+\), not of 'upr' \(c+\)"),
        (other(adapter={"name": "lora", "sha256": "d" * 64}), r"of the model alone, not of adapter 'lora' \(d{12}\)"),
        (other(options={"normalize": "sum"}), "of normalize mean, not of sum"),
        (other(options={"method": "yes_no"}), "of method query_likelihood, not of yes_no"),
    ],
)
def test_it_is_refused_with_anything_else(origin, words):
    with pytest.raises(InputError, match=f"^--calibration c.json was fitted on scores {words}"):
        Calibration(Platt(1.0, 0.0), ORIGIN).check(origin, "--calibration c.json")


def test_revisions_count_where_there_are_no_hashes():
    def of(**model):
        return other(model={"name": "org/model", "sha256": None, **model})

    calibration = Calibration(Platt(1.0, 0.0), of(revision="e" * 40))
    calibration.check(of(revision="e" * 40))
    with pytest.raises(InputError, match=r"of model 'org/model' \(e{12}\), not of 'org/model' \(f{12}\)"):
        calibration.check(of(revision="f" * 40))


def test_a_mixed_run_has_no_model_to_serve():
    calibration = Calibration(Platt(1.0, 0.0), None, False, {"command": "interpolate"})
    with pytest.raises(InputError, match="fitted on a run of 'interpolate', not on a model's scores"):
        calibration.check(ORIGIN)
