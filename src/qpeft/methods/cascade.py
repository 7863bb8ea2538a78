"""A cascade: a cheap score for all candidates, query likelihood for the best of them only.

    candidates ──cheap score──▶ survivors ──query likelihood──▶ ranking
                     └─▶ the others, below them, in the cheap score's order

Cheap scores:

* `first_stage`: the order in which the candidates come. It costs nothing.
* `passage_tokens=m`: query likelihood after the first m tokens of each passage.
* `layers=L`: query likelihood by the first L of the model's layers, followed by its last norm and head.

There may be several steps, each with fewer survivors than the one before: `--cascade 100:40:10
--cheap first_stage,layers=4`. A step that all of a query's candidates survive is left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, final

from qpeft.errors import OptionError, nearest
from qpeft.methods import query_likelihood
from qpeft.methods._rows import query_batches
from qpeft.pointwise import Pointwise
from qpeft.types import Candidates, Query, Ranking, Reranker

if TYPE_CHECKING:  # so that options can be listed without importing torch
    from qpeft.lm.pretrained import PretrainedLM

CHEAP = ("first_stage", "passage_tokens", "layers")


@dataclass(frozen=True)
class Config(query_likelihood.Config):
    """Options of a cascade, and of query likelihood."""

    cascade: str = "100:20"
    """Candidates that get the cheap score, and how many of them survive it; more steps as in 100:40:10."""
    cheap: str = "passage_tokens=32"
    """The cheap score: first_stage, passage_tokens=M or layers=L; one for each step but the last, with commas."""


def build(config: Config, lm: PretrainedLM) -> Reranker:
    """Return a reranker that scores with `lm`, most candidates cheaply.

    Raises:
        OptionError: options that contradict each other, or that the model or the adapter cannot do.
    """
    sizes, cheap = _sizes(config.cascade), config.cheap.split(",")
    if len(cheap) != len(sizes) - 1:
        raise OptionError(f"--cascade {config.cascade} needs {len(sizes) - 1} cheap scores; --cheap has {len(cheap)}")
    full = query_likelihood.build_scorer(config, lm)
    together = query_batches(config, lm)
    steps = [
        Step(size, None if options is None else Pointwise(full.cheaper(**options), together))
        for size, options in zip(sizes, [None, *map(_cheap, cheap)], strict=True)
    ]
    return Cascade(steps, Pointwise(full, together))


def _sizes(text: str) -> list[int]:
    if not re.fullmatch(r"\d+(:\d+)+", text):
        raise OptionError(f"--cascade {text}: write two numbers or more, as in 100:20")
    sizes = [int(number) for number in text.split(":")]
    if sizes[-1] < 1 or any(after >= before for before, after in pairwise(sizes)):
        raise OptionError(f"--cascade {text}: each number must be below the one before it, and the last at least 1")
    return sizes


def _cheap(text: str) -> dict[str, int] | None:
    """Return the options of a cheap scorer; None for the first stage's order."""
    name, equals, number = text.strip().partition("=")
    if name not in CHEAP:
        raise OptionError(f"--cheap {text}: unknown score {name!r}{nearest(name, CHEAP)}")
    if name == "first_stage":
        if equals:
            raise OptionError(f"--cheap {text}: first_stage takes no number")
        return None
    if not number.isdecimal() or int(number) < 1:
        raise OptionError(f"--cheap {text}: write a number of at least 1, as in {name}=4")
    return {name: int(number)}


@dataclass(frozen=True, slots=True)
class Step:
    """How many passages survive, and what ranks them; None: the order in which they come."""

    survivors: int
    reranker: Pointwise | None

    def rank(self, items: Sequence[Candidates]) -> list[Ranking]:
        """Return one ranking of all passages per item."""
        if self.reranker is not None:
            return list(self.reranker.rerank(items))
        return [
            Ranking.from_scores(item.query.id, ((passage.id, -i) for i, passage in enumerate(item.passages)))
            for item in items
        ]


@final
class Cascade(Reranker):
    """Ranks with each step what survived the one before; the rest stands below, in the order in which it fell out.

    Its counts are of all candidates, and of queries for which some step gave one score to all. Cut and empty passages
    are those that the full score met: a cheap one may cut on purpose.

    Args:
        steps: cheap ones.
        full: ranks what survives them all.
    """

    scores_all = False

    def __init__(self, steps: Sequence[Step], full: Pointwise) -> None:
        super().__init__()
        self._steps = steps
        self._full = full
        self.query_batches = full.query_batches
        self.facts = full.facts

    def check(self, query: Query) -> None:
        """Raise QueryError for a query that cannot be scored."""
        self._full.check(query)

    def rerank(self, items: Iterable[Candidates]) -> Iterator[Ranking]:
        """Yield one ranking per item, lazily and in order; see `Reranker.rerank`."""
        for together in self.query_batches.split(items):
            yield from self._rank(together)

    def _rank(self, items: list[Candidates]) -> Iterator[Ranking]:
        self.counts.pairs += sum(len(item.passages) for item in items)
        below: list[list[str]] = [[] for _ in items]
        constant = [False] * len(items)
        unreadable: list[frozenset[str]] = [frozenset()] * len(items)
        for step in self._steps:
            many = [i for i, item in enumerate(items) if len(item.passages) > step.survivors]
            for i, ranking in zip(many, step.rank([items[i] for i in many]), strict=True):
                dropped = [hit.passage_id for hit in ranking.hits[step.survivors :]]
                below[i] = dropped + below[i]
                items[i] = _without(items[i], set(dropped))
                constant[i] |= ranking.constant
                unreadable[i] |= ranking.unreadable.intersection(dropped)
        for i, ranking in enumerate(self._full.rerank(items)):
            self.counts.constant_queries += constant[i] or ranking.constant
            self._count()
            unreadable[i] |= ranking.unreadable
            yield replace(ranking.followed_by(below[i]), unreadable=unreadable[i])

    def _count(self) -> None:
        scorers = [step.reranker for step in self._steps if step.reranker is not None]
        self.counts.tokens = sum(scorer.counts.tokens for scorer in [*scorers, self._full])
        self.counts.truncated_passages = self._full.counts.truncated_passages
        self.counts.empty_passages = self._full.counts.empty_passages


def _without(item: Candidates, dropped: set[str]) -> Candidates:
    return Candidates(item.query, tuple(passage for passage in item.passages if passage.id not in dropped))
