"""Losses on the scores of groups: pure functions of tensors, differentiable, computed in float32 or better.

Shapes: `B` groups, `G` columns; a column is one passage of the group's query. `scores [B, G]` are mean log-likelihoods
in nats per query token, higher is better. `mask [B, G]` says which columns are real, since groups may have fewer
negatives; what stands in the others, NaN included, changes neither value nor gradient. Column 0 is the positive and all
others are negatives; a pair is the positive and one of them. Every loss is a scalar, and 0 where a batch has nothing to
compare.

Scores per token lie close together: `scale` spreads them before a softmax or a sigmoid.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from qpeft.errors import OptionError, nearest


def point(scores: Tensor, mask: Tensor) -> Tensor:
    """Return the mean over groups of −score of the positive, in nats per query token; ≥ 0 for log-likelihoods.

    The language-model loss on positives alone: L_point of Q-PEFT (arXiv 2404.04522).
    """
    return -_mean(_real(scores, mask)[..., :1], mask[..., :1])


def pair(scores: Tensor, mask: Tensor, *, margin: float) -> Tensor:
    """Return the mean over all pairs of max(0, negative − positive + margin); margin in nats per query token.

    The hinge L_pair of Q-PEFT (arXiv 2404.04522); margin 0 is the plain one.
    """
    return _mean(torch.relu(margin - _gaps(_real(scores, mask))), _pairs(mask))


def both(scores: Tensor, mask: Tensor, *, margin: float) -> Tensor:
    """Return `point` + `pair`, unweighted: the loss of Q-PEFT (arXiv 2404.04522)."""
    return point(scores, mask) + pair(scores, mask, margin=margin)


def ranknet(scores: Tensor, mask: Tensor, *, scale: float = 1.0) -> Tensor:
    """Return the mean over all pairs of ln(1 + exp(−scale · (positive − negative))), in nats.

    RankNet (Burges et al., ICML 2005), whose σ is `scale`.
    """
    return _mean(-nn.functional.logsigmoid(scale * _gaps(_real(scores, mask))), _pairs(mask))


def softmax(scores: Tensor, mask: Tensor, *, scale: float = 1.0) -> Tensor:
    """Return the mean over groups of −ln p(positive), p being the softmax of scale · scores; in nats.

    ListNet's top-one loss with a one-hot target (Cao et al., ICML 2007), which is InfoNCE over the group (arXiv
    1807.03748).
    """
    return -_mean(torch.log_softmax(_buried(scale * _real(scores, mask), mask), -1)[..., :1], mask[..., :1])


def cross_entropy(scores: Tensor, mask: Tensor) -> Tensor:
    """Return the mean over real columns of −ln p(what it is), p(positive) being the score's logistic function; in nats.

    Each pair by itself. Of log-odds of two answers, this is the cross-entropy of the right answer among the two.
    """
    real = _real(scores, mask)
    return _mean(-nn.functional.logsigmoid(torch.cat([real[..., :1], -real[..., 1:]], -1)), mask)


def sft(scores: Tensor, mask: Tensor, *, answered: Tensor) -> Tensor:
    """Return the mean over real columns of −ln P(the right answer), over the whole vocabulary; in nats.

    Supervised fine-tuning on the answer, as a language model learns a text. `scores` are the log-odds of two answers,
    `answered [B, G]` is ln(P(yes) + P(no)). Since P(right) = P(right | one of the two) · P(one of the two), the loss is
    `cross_entropy` and a part that moves probability from all other words to the two.
    """
    return cross_entropy(scores, mask) - _mean(_real(answered, mask), mask)


def plackett_luce(scores: Tensor, mask: Tensor, *, teacher: Tensor, scale: float = 1.0) -> Tensor:
    """Return the mean over groups of −ln P(the teacher's order), in nats, summed over the places of the order.

    P = Π_i exp(scale · s_i) / Σ_{j at or below i} exp(scale · s_j), columns taken by falling `teacher [B, G]`: ListMLE
    (Xia et al., ICML 2008). The teacher's values serve only to sort, so grades may stand there too; columns with
    equal values keep the order in which they are given. Those at a group's lowest value have none among themselves,
    and i runs over the others: what a teacher did not score stands there.
    """
    real, values = mask.bool(), _real(teacher, mask)
    above_lowest = real & (values > values.masked_fill(~real, math.inf).amin(-1, keepdim=True))
    order = values.argsort(dim=-1, descending=True, stable=True)
    sorted_scores = _buried(scale * _real(scores, mask), mask).gather(-1, order)
    at_or_below = torch.ones(order.shape[-1], order.shape[-1], dtype=torch.bool, device=order.device).triu()
    rivals = torch.logsumexp(_buried(sorted_scores.unsqueeze(-2), at_or_below), -1)
    per_group = (rivals - sorted_scores).masked_fill(~above_lowest.gather(-1, order), 0.0).sum(-1)
    return _mean(per_group, real.any(-1))


def margin_mse(scores: Tensor, mask: Tensor, *, teacher: Tensor) -> Tensor:
    """Return the mean over all pairs of ((s⁺ − s⁻) − (t⁺ − t⁻))², in squared units of the scores.

    Margin-MSE (Hofstätter et al., arXiv 2010.02666). `teacher [B, G]` gets no gradient, and should be in the units of
    the scores.
    """
    return _mean((_gaps(_real(scores, mask)) - _gaps(_real(teacher.detach(), mask))).square(), _pairs(mask))


def anchor(scores: Tensor, zero_shot: Tensor, mask: Tensor) -> Tensor:
    """Return the mean over real columns of (score − zero-shot score)², in squared nats per query token.

    Holds an adapted model near the untrained one; ours. `zero_shot [B, G]` gets no gradient.
    """
    return _mean((_real(scores, mask) - _real(zero_shot.detach(), mask)).square(), mask)


LOSSES: dict[str, Callable[..., Tensor]] = {
    "point": point,
    "pair": pair,
    "both": both,
    "ranknet": ranknet,
    "softmax": softmax,
    "cross_entropy": cross_entropy,
    "sft": sft,
    "plackett_luce": plackett_luce,
    "margin_mse": margin_mse,
}
"""By name. Besides scores and mask, each takes those of the options of `loss` that its signature names."""


COMPARING = frozenset({"pair", "ranknet", "softmax", "plackett_luce", "margin_mse"})
"""Those that are 0 where a group has one passage."""
ScoreKind = Literal["log_likelihood", "log_odds", "answers"]
"""Scores with a bound of 0, or with 0 in the middle; of the latter, those that are the log-odds of two answers."""


def check_loss(name: str, *, teacher: bool, scores: ScoreKind | None = None, alone: bool = False) -> None:
    """Raise the error that a loss would end in, before there are any scores.

    Args:
        name: of the loss.
        teacher: whether there is one.
        scores: their kind.
        alone: whether positives stand alone, without negatives.

    Raises:
        OptionError: no loss has this name, or it learns from a teacher and there is none; or it makes no sense for
            scores of this kind, or without negatives.
    """
    if name not in LOSSES:
        raise OptionError(f"unknown loss {name!r}{nearest(name, LOSSES)}")
    if takes(name, "teacher") and not teacher:
        raise OptionError(f"the loss {name!r} learns from a teacher's scores, and there are none")
    if scores in ("log_odds", "answers") and name in ("point", "both"):
        raise OptionError(f"--loss {name}: it makes a log-likelihood large; take softmax or cross_entropy")
    if scores == "log_likelihood" and name == "cross_entropy":
        raise OptionError("--loss cross_entropy: 0 must be the middle of the scores: --method classifier or yes_no")
    if scores in ("log_likelihood", "log_odds") and name == "sft":
        raise OptionError("--loss sft: it learns the tokens of two answers, which only --method yes_no has")
    if alone and name in COMPARING:
        raise OptionError(f"--loss {name}: it compares passages, and no query has negatives; see --negatives")


def loss(
    name: str,
    scores: Tensor,
    mask: Tensor,
    *,
    margin: float,
    scale: float,
    teacher: Tensor | None,
    answered: Tensor | None = None,
) -> Tensor:
    """Return the loss of this name, a scalar; options that it does not take are ignored.

    Args:
        name: one of `LOSSES`.
        scores: `[B, G]`, nats per query token.
        mask: `[B, G]`, true where a column is real.
        margin: nats per query token; of `pair` and `both`.
        scale: factor on scores; of `ranknet`, `softmax` and `plackett_luce`.
        teacher: `[B, G]`; of `plackett_luce` and `margin_mse`.
        answered: `[B, G]`, the log of both answers' probability; of `sft`.

    Raises:
        OptionError: no loss has this name, or it learns from a teacher or from answers and there are none.
    """
    check_loss(name, teacher=teacher is not None)
    if takes(name, "answered") and answered is None:
        raise OptionError(f"the loss {name!r} learns the tokens of two answers, and there are none")
    given = {"margin": margin, "scale": scale, "teacher": teacher, "answered": answered}
    return LOSSES[name](scores, mask, **{option: given[option] for option in given if takes(name, option)})


def takes(name: str, option: str) -> bool:
    """Return whether a loss has an option, such as a teacher's scores."""
    return option in inspect.signature(LOSSES[name]).parameters


def _real(values: Tensor, mask: Tensor) -> Tensor:
    """Return values in float32 (float64 stays), 0 where the mask is off: NaN would survive a product with 0."""
    values = values if values.dtype == torch.float64 else values.float()
    return values.masked_fill(~mask.bool(), 0.0)


def _buried(values: Tensor, mask: Tensor) -> Tensor:
    """Return values so low where the mask is off that exp gives 0; −∞ would give NaN where nothing is real."""
    return values.masked_fill(~mask.bool(), torch.finfo(values.dtype).min / 4)


def _pairs(mask: Tensor) -> Tensor:
    """Return `[B, G − 1]`: whether the positive and the negative are both real."""
    real = mask.bool()
    return real[..., :1] & real[..., 1:]


def _gaps(scores: Tensor) -> Tensor:
    """Return `[B, G − 1]`: the positive's score minus each negative's."""
    return scores[..., :1] - scores[..., 1:]


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean where the mask is on, 0 if it is nowhere."""
    return values.masked_fill(~mask.bool(), 0.0).sum() / mask.bool().sum().clamp(min=1)
