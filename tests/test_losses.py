"""Losses against the formulas, written out as loops over Python floats."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qpeft.errors import OptionError
from qpeft.losses import (
    LOSSES,
    anchor,
    both,
    check_loss,
    loss,
    margin_mse,
    pair,
    plackett_luce,
    point,
    ranknet,
    softmax,
)

MARGIN, SCALE = 0.3, 4.0
SMOOTH = ["point", "ranknet", "softmax", "cross_entropy", "sft", "plackett_luce", "margin_mse"]


def columns(mask):
    return [i for i, real in enumerate(mask) if real]


def pairs(mask):
    return [(0, i) for i in columns(mask) if i and mask[0]]


def mean(values):
    return sum(values) / len(values) if values else 0.0


def naive_point(groups):
    return mean([-s[0] for s, m, _ in groups if m[0]])


def naive_pair(groups):
    return mean([max(0.0, s[j] - s[i] + MARGIN) for s, m, _ in groups for i, j in pairs(m)])


def naive_ranknet(groups):
    return mean([math.log1p(math.exp(-SCALE * (s[i] - s[j]))) for s, m, _ in groups for i, j in pairs(m)])


def naive_softmax(groups):
    totals = [(s[0], sum(math.exp(SCALE * s[i]) for i in columns(m))) for s, m, _ in groups if m[0]]
    return mean([-math.log(math.exp(SCALE * positive) / total) for positive, total in totals])


def naive_cross_entropy(groups):
    def probability(score):
        return 1 / (1 + math.exp(-score))

    return mean([-math.log(probability(s[i] if i == 0 else -s[i])) for s, m, _ in groups for i in columns(m)])


def naive_sft(groups):
    right = []
    for s, m, t in groups:
        for i in columns(m):
            total = math.exp(-abs(t[i]))  # as in `named`
            yes = total / (1 + math.exp(-s[i]))
            right.append(yes if i == 0 else total - yes)
    return mean([-math.log(probability) for probability in right])


def naive_plackett_luce(groups):
    per_group = []
    for s, m, t in groups:
        order = sorted(columns(m), key=lambda i: -t[i])
        probability = 1.0
        for place, i in enumerate(order):
            if t[i] > t[order[-1]]:
                probability *= math.exp(SCALE * s[i]) / sum(math.exp(SCALE * s[j]) for j in order[place:])
        if order:
            per_group.append(-math.log(probability))
    return mean(per_group)


def naive_margin_mse(groups):
    return mean([((s[i] - s[j]) - (t[i] - t[j])) ** 2 for s, m, t in groups for i, j in pairs(m)])


NAIVE = {
    "point": naive_point,
    "pair": naive_pair,
    "both": lambda groups: naive_point(groups) + naive_pair(groups),
    "ranknet": naive_ranknet,
    "softmax": naive_softmax,
    "cross_entropy": naive_cross_entropy,
    "sft": naive_sft,
    "plackett_luce": naive_plackett_luce,
    "margin_mse": naive_margin_mse,
}

SCORES = torch.tensor([[-1.0, -1.2, -0.7, -3.0], [-2.0, -1.9, -2.5, -2.2], [-1.5, -1.4, -0.2, -0.1]])
MASK = torch.tensor([[True, True, True, True], [True, True, True, False], [True, True, False, False]])
TEACHER = torch.tensor([[3.0, 1.0, 1.0, 0.0], [0.5, 2.0, -1.0, 9.0], [1.0, 0.0, 9.0, 9.0]])


def named(name, scores=SCORES, mask=MASK, teacher=TEACHER, margin=MARGIN, scale=SCALE):
    """Return the loss; the answers' log-probability is made of the teacher, which no loss takes besides."""
    answered = -(TEACHER if teacher is None else teacher).abs()
    return loss(name, scores, mask, margin=margin, scale=scale, teacher=teacher, answered=answered)


@st.composite
def batches(draw):
    """Groups of (scores, mask, teacher); scores have a few digits, so that ties occur."""
    width = draw(st.integers(1, 5))

    def row(elements):
        return draw(st.lists(elements, min_size=width, max_size=width))

    number = st.integers(-40, 0).map(lambda value: value / 10)
    return [
        (row(number), row(st.booleans()), row(st.integers(-3, 3).map(float))) for _ in range(draw(st.integers(1, 4)))
    ]


@pytest.mark.parametrize("name", sorted(LOSSES))
@settings(deadline=None)
@given(batches())
def test_equals_the_formula(name, groups):
    scores, mask, teacher = (torch.from_numpy(np.array(part)) for part in zip(*groups, strict=True))
    found = named(name, scores, mask, teacher)
    assert found.shape == ()
    assert float(found) == pytest.approx(NAIVE[name](groups), rel=1e-9, abs=1e-12)
    in_float32 = named(name, scores.float(), mask, teacher.float())
    assert in_float32.dtype == torch.float32
    assert float(in_float32) == pytest.approx(NAIVE[name](groups), rel=1e-4, abs=1e-5)


def test_every_loss_has_a_formula_here():
    assert LOSSES.keys() == NAIVE.keys()


@pytest.mark.parametrize("filler", [0.0, -1e30, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("name", sorted(LOSSES))
def test_what_is_masked_has_no_influence(name, filler):
    values, gradients = [], []
    for fill in (-1.0, filler):
        scores = SCORES.masked_fill(~MASK, fill).requires_grad_()
        value = named(name, scores, teacher=TEACHER.masked_fill(~MASK, fill)) + anchor(scores, TEACHER, MASK)
        value.backward()
        values.append(value.detach())
        gradients.append(scores.grad)
    assert torch.equal(*values)
    assert torch.equal(*gradients)
    assert gradients[0][~MASK].count_nonzero() == 0


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_gradients_are_finite_and_reach_every_real_column(name):
    scores = SCORES.clone().requires_grad_()
    named(name, scores, margin=5.0).backward()
    assert scores.grad.isfinite().all()
    reached = MASK & (torch.arange(4) == 0) if name == "point" else MASK
    assert torch.equal(scores.grad != 0, reached)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_gradients_stay_finite_at_extreme_scores(name):
    scores = torch.tensor([[-1e4, 0.0, -1e4], [0.0, -1e4, -1e4]], requires_grad=True)
    value = named(name, scores, torch.ones(2, 3, dtype=torch.bool), torch.tensor([[2.0, 1.0, 0.0]] * 2))
    value.backward()
    assert value.isfinite()
    assert scores.grad.isfinite().all()


@pytest.mark.parametrize("name", SMOOTH)
def test_gradients_are_those_of_the_value(name):
    scores = SCORES.double().requires_grad_()
    assert torch.autograd.gradcheck(partial(named, name), (scores,))


def test_gradient_of_the_anchor():
    scores = SCORES.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda scores: anchor(scores, TEACHER.double(), MASK), (scores,))


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_nothing_to_compare_is_zero(name):
    scores = SCORES.clone().requires_grad_()
    value = named(name, scores, torch.zeros_like(MASK)) + anchor(scores, TEACHER, torch.zeros_like(MASK))
    value.backward()
    assert value == 0
    assert scores.grad.count_nonzero() == 0


@pytest.mark.parametrize("name", sorted(LOSSES))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_scores_are_computed_in_float32(name, dtype):
    scores = SCORES.to(dtype)
    assert named(name, scores).dtype == torch.float32
    assert torch.equal(named(name, scores), named(name, scores.float()))


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_a_mask_of_numbers_is_a_mask(name):
    assert torch.equal(named(name, mask=MASK.long()), named(name))


@pytest.mark.parametrize("name", [*SMOOTH, "pair", "both"])
def test_a_better_positive_lowers_the_loss(name):
    better = SCORES.clone()
    better[:, 0] += 0.2
    teacher = torch.tensor([[9.0, 0.0, -1.0, -2.0]]).expand(3, 4)
    assert named(name, better, teacher=teacher) < named(name, teacher=teacher)


def test_pair_is_zero_once_margins_are_met():
    scores = torch.tensor([[-1.0, -1.5, -2.0], [-0.25, -0.75, -9.0]])
    real = torch.ones(2, 3, dtype=torch.bool)
    assert pair(scores, real, margin=0.5) == 0
    assert pair(scores, real, margin=0.75) == pytest.approx((0.25 + 0.25) / 4)


@settings(deadline=None)
@given(st.floats(-9, 0), st.floats(-9, 0))
def test_swapping_positive_and_negative_changes_the_sign(positive, negative):
    real = torch.ones(1, 2, dtype=torch.bool)
    scores = torch.tensor([[positive, negative]], dtype=torch.float64)
    large = 20.0  # so large a margin keeps the hinge open, and the loss minus it is the raw difference
    one, other = pair(scores, real, margin=large) - large, pair(scores.flip(-1), real, margin=large) - large
    assert float(one) == pytest.approx(negative - positive, abs=1e-12)
    assert float(one) == pytest.approx(-float(other), abs=1e-12)


def test_both_is_the_sum():
    assert both(SCORES, MASK, margin=MARGIN) == point(SCORES, MASK) + pair(SCORES, MASK, margin=MARGIN)


def test_softmax_is_cross_entropy_towards_column_0():
    whole = SCORES[:, :2]
    expected = torch.nn.functional.cross_entropy(SCALE * whole, torch.zeros(3, dtype=torch.long))
    assert softmax(whole, torch.ones_like(whole), scale=SCALE) == pytest.approx(float(expected))


def test_plackett_luce_takes_equal_teachers_as_given():
    scores, real = torch.tensor([[-1.0, -2.0, -3.0, -4.0]]), torch.ones(1, 4)
    given_order = plackett_luce(scores, real, teacher=torch.tensor([[1, 1, 1, 0]]))
    assert given_order == plackett_luce(scores, real, teacher=torch.tensor([[3, 2, 1, 0]]))
    assert given_order < plackett_luce(scores, real, teacher=torch.tensor([[1, 2, 3, 0]]))


def test_plackett_luce_puts_what_a_teacher_did_not_score_in_no_order():
    mask = torch.tensor([[True, True, False, True, True]])
    teacher = torch.tensor([[5.0, -7.0, -9.0, 6.0, -7.0]])
    scores = torch.tensor([[-1.0, -2.0, 3.0, -1.5, -2.0]], dtype=torch.float64, requires_grad=True)
    value = plackett_luce(scores, mask, teacher=teacher, scale=SCALE)
    e = {score: math.exp(SCALE * score) for score in (-1.0, -1.5, -2.0)}
    first, second = e[-1.5] / (e[-1.5] + e[-1.0] + 2 * e[-2.0]), e[-1.0] / (e[-1.0] + 2 * e[-2.0])
    assert float(value.detach()) == pytest.approx(-math.log(first) - math.log(second), rel=1e-12)
    (gradient,) = torch.autograd.grad(value, scores)
    assert gradient[0, 1] == gradient[0, 4] > 0
    apart = scores.detach() + torch.tensor([0.0, 0.0, 0.0, 0.0, 0.7])
    swapped = plackett_luce(apart[:, [0, 4, 2, 3, 1]], mask, teacher=teacher, scale=SCALE)
    assert float(swapped) == pytest.approx(float(plackett_luce(apart, mask, teacher=teacher, scale=SCALE)), rel=1e-12)


def test_plackett_luce_of_a_teacher_without_an_order_is_zero():
    scores = SCORES.clone().requires_grad_()
    value = plackett_luce(scores, MASK, teacher=torch.full_like(SCORES, 2.0).masked_fill(~MASK, -9.0))
    value.backward()
    assert value == 0
    assert scores.grad.count_nonzero() == 0


def test_plackett_luce_passes_over_what_is_masked_wherever_it_stands():
    scores, mask = torch.tensor([[-1.0, -2.0, -3.0]]), torch.tensor([[True, False, True]])
    expected = plackett_luce(scores[:, [0, 2]], torch.ones(1, 2), teacher=torch.tensor([[0.5, -0.5]]))
    assert expected > 0
    for between in (-9.0, 0.0, 9.0):
        assert plackett_luce(scores, mask, teacher=torch.tensor([[0.5, between, -0.5]])) == expected


def test_two_columns_make_one_loss_of_three():
    scores, real = torch.tensor([[-1.0, -1.5], [-2.0, -1.0]]), torch.ones(2, 2)
    one, two = ranknet(scores, real, scale=SCALE), softmax(scores, real, scale=SCALE)
    three = plackett_luce(scores, real, teacher=torch.tensor([[1, 0]] * 2), scale=SCALE)
    assert float(one) == pytest.approx(float(two))
    assert float(two) == pytest.approx(float(three))


def test_teachers_and_anchors_get_no_gradient():
    scores, teacher = SCORES.clone().requires_grad_(), TEACHER.clone().requires_grad_()
    value = margin_mse(scores, MASK, teacher=teacher) + anchor(scores, teacher, MASK)
    (value + plackett_luce(scores, MASK, teacher=teacher)).backward()
    assert teacher.grad is None


def test_anchor():
    zero_shot = SCORES + torch.tensor([0.5, 0.0, 0.0, 100.0]).expand(3, 4)
    assert anchor(SCORES, SCORES, MASK) == 0
    assert float(anchor(SCORES, zero_shot, MASK)) == pytest.approx((3 * 0.25 + 100**2) / 9)


def test_answers_learn_from_their_probability_too():
    answered = torch.full_like(SCORES, -2.0).requires_grad_()
    scores = SCORES.clone().requires_grad_()
    value = LOSSES["sft"](scores, MASK, answered=answered)
    value.backward()
    assert float(value.detach()) == pytest.approx(float(LOSSES["cross_entropy"](SCORES, MASK)) + 2.0)
    assert torch.equal(answered.grad, -MASK.float() / MASK.sum())
    (expected,) = torch.autograd.grad(LOSSES["cross_entropy"](scores, MASK), scores)
    assert torch.equal(scores.grad, expected)
    with pytest.raises(OptionError, match="the loss 'sft' learns the tokens of two answers, and there are none"):
        loss("sft", SCORES, MASK, margin=0.0, scale=1.0, teacher=None)


def test_unknown_loss():
    with pytest.raises(OptionError, match="unknown loss 'ranket'; did you mean 'ranknet'"):
        named("ranket")


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_distillation_needs_a_teacher(name):
    if name in ("plackett_luce", "margin_mse"):
        with pytest.raises(OptionError, match=f"the loss '{name}' learns from a teacher's scores"):
            named(name, teacher=None)
        with pytest.raises(OptionError):
            check_loss(name, teacher=False)
    else:
        assert torch.equal(named(name, teacher=None), named(name))
        check_loss(name, teacher=False)
    check_loss(name, teacher=True)


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("both", "log_odds", "--loss both: it makes a log-likelihood large"),
        ("point", "log_odds", "take softmax or cross_entropy"),
        ("point", "answers", "take softmax or cross_entropy"),
        ("cross_entropy", "log_likelihood", "--method classifier or yes_no"),
        ("sft", "log_likelihood", "--loss sft: it learns the tokens of two answers, which only --method yes_no has"),
        ("sft", "log_odds", "--loss sft"),
    ],
)
def test_losses_that_make_no_sense_for_a_kind_of_score(name, kind, message):
    with pytest.raises(OptionError, match=message):
        check_loss(name, teacher=False, scores=kind)
    check_loss(name, teacher=False)


@pytest.mark.parametrize("kind", ["log_odds", "log_likelihood", "answers"])
def test_losses_that_suit_any_score(kind):
    for name in ("softmax", "pair", "ranknet", *(["cross_entropy", "sft"] if kind == "answers" else [])):
        check_loss(name, teacher=False, scores=kind)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_what_is_masked_stays_below_any_score(name):
    low = torch.tensor([[-1e4, -2e4]])
    wide = torch.cat([low, torch.zeros(1, 1)], -1)
    mask = torch.tensor([[True, True, False]])
    teacher = torch.tensor([[1.0, 0.0, 0.0]])
    assert named(name, wide, mask, teacher) == named(name, low, mask[:, :2], teacher[:, :2])


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_losses_that_compare_need_negatives(name):
    """Those that are 0 where every positive stands alone."""
    if named(name, SCORES[:, :1], MASK[:, :1], TEACHER[:, :1]) == 0:
        with pytest.raises(OptionError, match=f"--loss {name}: it compares passages, and no query has negatives"):
            check_loss(name, teacher=True, alone=True)
    else:
        check_loss(name, teacher=True, alone=True)
