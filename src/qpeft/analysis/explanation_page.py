"""Explanations as one HTML page: no network, no scripts, readable on light and dark, on a phone and on paper."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qpeft.analysis.explain import Explanation, PassageToken, most_read
from qpeft.analysis.pages import render
from qpeft.analysis.pieces import words
from qpeft.evaluation.tables import number

OPEN = 3
"""Passages of a query that are unfolded at first."""
_FAINT = 0.04  # of the largest; less cannot be seen
_READ = 4  # passage tokens named for a query token


@dataclass(frozen=True, slots=True)
class Shade:
    """A piece of text: blanks before it, how strongly it is shaded (0 to 1), its rank in the hint, words on hover."""

    blank: str
    text: str
    strength: float
    rank: int | None
    hover: str
    muted: bool


def explanation_page(items: Sequence[tuple[str, Sequence[Explanation]]], title: str) -> str:
    """Return a page with a section for each query.

    Args:
        items: text of a query, and its explanations; shown in the order of their ranks, with the adapter where there is
            one.
        title: heading of the page.
    """
    every = [explanation for _, explanations in items for explanation in explanations]
    hinted = any(explanation.hinted_score is not None for explanation in every)
    context = {
        "title": title,
        "items": [(text, sorted(found, key=lambda each: each.place)) for text, found in items],
        "hinted": hinted,
        "reach": _reach(every, hinted),
        "chosen": any(explanation.hint for explanation in every),
        "attended": any(token.attention for explanation in every for token in explanation.tokens),
    }
    return render(
        "explain.html",
        context,
        number=number,
        words=words,
        shades=_shades,
        reading=_reading,
        most_read=most_read,
        open=OPEN,
    )


def _reach(explanations: Sequence[Explanation], hinted: bool) -> float:
    """Return the value at which colours are full, in nats: that of all but the outermost twentieth of the tokens."""
    tokens = [token for explanation in explanations for token in explanation.query]
    sizes = sorted(abs(token.change or 0.0) if hinted else -token.log_prob for token in tokens)
    return max(sizes[int(0.95 * (len(sizes) - 1))], 0.1) if sizes else 1.0


def _shades(explanation: Explanation) -> list[Shade]:
    """Return a passage's tokens as they are shaded; neighbours that are not are taken together."""
    top = max((token.attention or 0.0 for token in explanation.tokens), default=0.0) or 1.0
    found: list[Shade] = []
    for token in explanation.tokens:
        shade = _shade(token, top)
        last = found[-1] if found else None
        if last and last.muted == shade.muted and not (last.hover or shade.hover):
            found[-1] = Shade(last.blank, last.text + shade.blank + shade.text, 0.0, None, "", last.muted)
        else:
            found.append(shade)
    return found


def _shade(token: PassageToken, top: float) -> Shade:
    text = token.text.lstrip()
    strength, hover = 0.0, ""
    if token.chosen is not None:
        strength, hover = 1.0, f"hint word {token.chosen}"
    elif token.attention is not None and token.attention >= _FAINT * top:
        strength, hover = token.attention / top, f"{token.attention:.1%} of the attention"
    blank = token.text[: len(token.text) - len(text)]
    return Shade(blank, text, strength, token.chosen, hover, token.of_template)


def _reading(explanation: Explanation) -> list[tuple[str, list[tuple[str, float]]]]:
    """Return, for each query token, the passage tokens that it attends to most, with their shares of 1."""
    if explanation.attention is None:
        return []
    own = [token.text for token in explanation.query if not token.of_template]
    listed = words([token.text for token in explanation.tokens])
    found = []
    for word, shares in zip(words(own), explanation.attention, strict=True):
        best = sorted(range(len(shares)), key=lambda place: -shares[place])[:_READ]
        found.append((word, [(listed[place], shares[place]) for place in best if shares[place] >= 0.01]))
    return found
