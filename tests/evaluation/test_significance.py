import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from qpeft.errors import OptionError
from qpeft.evaluation.measures import Evaluation
from qpeft.evaluation.significance import (
    bootstrap_interval,
    compare,
    compare_all_pairs,
    holm,
    paired_t,
    permutation,
    wilcoxon,
)


def evaluation(tag, **measures):
    queries = tuple(f"q{number}" for number in range(max(map(len, measures.values()))))
    per_query = {
        measure: {q: v for q, v in zip(queries, values, strict=False) if v is not None}
        for measure, values in measures.items()
    }
    return Evaluation(tag, tuple(measures), queries, frozenset(), per_query)


def scores(seed, queries=80, gain=0.0):
    rng = np.random.default_rng(seed)
    return np.round(np.clip(rng.normal(0.5 + gain, 0.2, queries), 0, 1), 2).tolist()


def test_p_values_are_scipys():
    a, b = scores(1), scores(2, gain=0.08)
    (found,) = compare(evaluation("a", m=a), [evaluation("b", m=b)], resamples=2000)
    assert found.p_values["t"] == pytest.approx(stats.ttest_rel(b, a).pvalue)
    assert found.p_values["wilcoxon"] == pytest.approx(stats.wilcoxon(np.subtract(b, a).round(9)).pvalue)
    reference = stats.permutation_test(
        (np.array(b), np.array(a)),
        lambda x, y, axis: np.mean(x - y, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=20_000,
        rng=np.random.default_rng(5),
    )
    assert found.p_values["permutation"] == pytest.approx(reference.pvalue, abs=0.01)
    assert found.difference == pytest.approx(np.mean(b) - np.mean(a))
    assert (found.wins, found.ties, found.losses) == (
        sum(y > x for x, y in zip(a, b, strict=True)),
        sum(y == x for x, y in zip(a, b, strict=True)),
        sum(y < x for x, y in zip(a, b, strict=True)),
    )


@pytest.mark.parametrize("seed", range(3))
def test_few_queries_are_tested_over_all_sign_flips(seed):
    d = np.random.default_rng(seed).normal(0.3, 1.0, 9)
    means = [abs(np.mean(np.multiply(signs, d))) for signs in itertools.product((1, -1), repeat=9)]
    assert permutation(d) == pytest.approx(np.mean([mean >= abs(d.mean()) - 1e-12 for mean in means]))
    exact = stats.permutation_test(
        (d, np.zeros(9)), lambda x, y: np.mean(x - y), permutation_type="samples", n_resamples=np.inf
    )
    assert permutation(d) == pytest.approx(exact.pvalue)
    assert permutation(np.concatenate([d, np.zeros(50)])) == pytest.approx(exact.pvalue)


def test_sampled_sign_flips_approach_the_exact_test_and_repeat_with_the_seed():
    d = np.random.default_rng(3).normal(0.5, 1.0, 12)
    assert permutation(d, resamples=4000, seed=1) == pytest.approx(permutation(d, resamples=5000), abs=0.02)
    assert permutation(d, resamples=4000, seed=1) == permutation(d, resamples=4000, seed=1)
    assert permutation(np.ones(100), resamples=999) == 1 / 1000


def test_bootstrap_interval_is_that_of_resampled_means():
    values = np.array(scores(4, queries=200))
    low, high = bootstrap_interval(values, resamples=4000, seed=1)
    rng = np.random.default_rng(99)
    means = [values[rng.integers(0, 200, 200)].mean() for _ in range(4000)]
    assert (low, high) == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=0.004)
    assert (low, high) == bootstrap_interval(values, resamples=4000, seed=1)


def test_holm_by_hand():
    # sorted: .005·4, .01·3, .03·2, and .04·1, which may not fall below the one before
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([None, 0.02, None, 0.5]) == [None, 0.04, None, 0.5]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), max_size=12))
def test_holm_lies_between_no_correction_and_bonferronis(p_values):
    corrected = holm(p_values)
    for p, value in zip(p_values, corrected, strict=True):
        assert p <= value <= min(1.0, p * len(p_values)) or value == max(corrected)
        assert value <= 1
    assert [corrected[i] for i in np.argsort(p_values, kind="stable")] == sorted(corrected)


def test_degenerate_differences_give_no_warning_and_no_made_up_p():
    zeros, one, equal, none = np.zeros(5), np.array([0.5]), np.full(4, 0.25), np.array([])
    assert (paired_t(zeros), wilcoxon(zeros), permutation(zeros)) == (1.0, 1.0, 1.0)
    rounded = np.array([1 / 2 - 1 / 3, 1 / 6, -1 / 6, 0.5, 1.0, -0.25, 1 / 3])
    exact = np.array([2, 2, -2, 6, 12, -3, 4])  # twelfths
    assert len(set(np.abs(rounded))) > len(set(np.abs(exact))), "rounding makes two of one"
    assert wilcoxon(rounded) == stats.wilcoxon(exact).pvalue
    assert (paired_t(one), wilcoxon(one), permutation(one)) == (None, 1.0, 1.0)
    assert paired_t(equal) is None
    assert permutation(equal) == 2 / 2**4
    assert (paired_t(none), wilcoxon(none), permutation(none)) == (None, None, None)
    assert bootstrap_interval(zeros) == (0.0, 0.0)
    assert bootstrap_interval(one) is None
    (found,) = compare(evaluation("a", m=[None]), [evaluation("b", m=[1.0])])
    assert (found.queries, found.mean, found.difference, found.interval) == (0, None, None, None)
    assert not found.significant()


def test_correction_covers_all_runs_and_measures():
    base = evaluation("base", m=scores(1), n=scores(2))
    others = [evaluation("x", m=scores(3, gain=0.1), n=scores(4)), evaluation("y", m=scores(5), n=scores(6, gain=0.05))]
    found = compare(base, others, resamples=500)
    assert [(each.run, each.measure) for each in found] == [("x", "m"), ("x", "n"), ("y", "m"), ("y", "n")]
    for test in ("t", "wilcoxon", "permutation"):
        assert [each.corrected[test] for each in found] == holm([each.p_values[test] for each in found])
    alone = compare(base, others[1:], resamples=500)
    assert [each.p_values for each in alone] == [each.p_values for each in found[2:]]


def test_all_pairs_and_their_mirror_image():
    a, b, c = (evaluation(tag, m=scores(seed)) for seed, tag in enumerate("abc"))
    pairs = compare_all_pairs([a, b, c], resamples=500)
    assert [(each.baseline, each.run) for each in pairs] == [("a", "b"), ("a", "c"), ("b", "c")]
    (forth,), (back,) = compare(a, [b], resamples=500), compare(b, [a], resamples=500)
    assert back.difference == pytest.approx(-forth.difference)
    assert (back.wins, back.ties, back.losses) == (forth.losses, forth.ties, forth.wins)
    assert back.p_values == pytest.approx(forth.p_values)


def test_a_clean_measure_is_paired_over_the_queries_that_both_have():
    a = evaluation("a", m=[0.1, None, 0.3, 0.5])
    b = evaluation("b", m=[0.4, 0.9, None, 0.5])
    (found,) = compare(a, [b])
    assert (found.queries, found.wins, found.ties, found.losses) == (2, 1, 1, 0)
    assert found.baseline_mean == pytest.approx(0.3)
    assert found.mean == pytest.approx(0.45)


def test_rounding_is_not_a_difference():
    (found,) = compare(evaluation("a", m=[0.1 + 0.2, 0.5]), [evaluation("b", m=[0.3, 0.5])])
    assert (found.wins, found.ties, found.losses, found.p_values["t"]) == (0, 2, 0, 1.0)


def test_what_cannot_be_compared_is_refused():
    a = evaluation("a", m=[0.1, 0.2])
    with pytest.raises(OptionError, match="tagged 'a'"):
        compare(a, [a])
    with pytest.raises(OptionError, match="different queries"):
        compare(a, [evaluation("b", m=[0.1])])
    with pytest.raises(OptionError, match="no measure in common"):
        compare(a, [evaluation("b", n=[0.1, 0.2])])
    with pytest.raises(OptionError, match="resamples"):
        compare(a, [evaluation("b", m=[0.1, 0.2])], resamples=0)


def test_permutation_of_thousands_of_queries_is_sampled():
    rng = np.random.default_rng(3)
    differences = rng.normal(0.0, 1.0, 4000)
    assert permutation(differences, resamples=500, seed=1) == pytest.approx(
        float(stats.ttest_1samp(differences, 0.0).pvalue), abs=0.1
    )


def test_rounding_makes_no_difference_to_a_test():
    tenths = np.array([5, 4, -1, -3, -1, 1])
    assert permutation(tenths / 10) == permutation(tenths.astype(float)) == 0.625
    assert paired_t(np.array([0.1 + 0.2, 0.3, 0.5 - 0.2])) is None


def test_seeds_and_resamples_are_those_asked_for():
    a, b = scores(1), scores(2, gain=0.02)
    (found,) = compare(evaluation("a", m=a), [evaluation("b", m=b)], resamples=200, seed=3)
    d = np.subtract(b, a)
    assert found.p_values["permutation"] == permutation(d, resamples=200, seed=3) != permutation(d, resamples=200)
    assert found.interval == bootstrap_interval(d, resamples=200, seed=3) != bootstrap_interval(d, resamples=200)
