"""Studies of where relevance is learned: what is compared, and what was found.

A study asks what a measure is when only some additions of some adapters act, on the same candidates. Adapters that
differ by seed alone are averaged, query by query; intervals are over queries and seeds (`study_intervals.py`). With
M(c) for some additions, M(full) for those that others are compared with, M(0) for the adapters of M(full) without any:

    drop M(full) − M(c)      gain M(c) − M(0)      share M(c) / M(full)      recovered (M(c) − M(0)) / (M(full) − M(0))

The share of the measure flatters: M(0) is seldom near 0. The share of the gain does not. M(0) keeps whatever else an
adapter has, such as a score head. A study has one M(0), so that gains of any two lines can be compared: what other
adapters would be without their additions, with heads of their own, enters none of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qpeft.adapters._lora_targets import Place
from qpeft.analysis.ablation import NONE, Ablation, Places
from qpeft.analysis.study_intervals import Interval, draws, interval, ratio_interval
from qpeft.evaluation.significance import Floats

Values = Mapping[tuple[int, Places], Floats]
"""Values of the measure, one for each query, by adapter (its index) and the additions that act."""


@dataclass(frozen=True)
class Subject:
    """An adapter that is studied.

    Attributes:
        folder: where it stands.
        sha256: of its weights.
        rank: of its additions.
        seed: of its training, where that is known.
        places: parameters of each addition.
        step: of a checkpoint.
        scales: what each addition is multiplied with, in the order of `places`.
        method: that it was trained for.
        loss: that it was trained with, where that is known.
        prompt: fingerprint of how input is written.
        only_additions: whether it has nothing else, such as a head: then two that agree in how input is written are the
            same without additions.
    """

    folder: str
    sha256: str
    rank: int
    seed: int | None
    places: Mapping[Place, int]
    step: int | None = None
    scales: tuple[float, ...] = ()
    method: str = "query_likelihood"
    loss: str | None = None
    prompt: str = ""
    only_additions: bool = False

    @property
    def parameters(self) -> int:
        """Parameters of all additions."""
        return sum(self.places.values())

    @property
    def component(self) -> str:
        """What was trained: attention, mlp or both."""
        found = {place.component for place in self.places}
        return "both" if len(found) > 1 else next(iter(found))


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a study: the additions that act, and in which adapters (by index); they differ by seed alone."""

    ablation: Ablation
    adapters: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Design:
    """What a study measures; `full` is the line that the others are compared with, and whose adapters have M(0)."""

    study: str
    lines: tuple[Line, ...]
    full: Line

    def sets(self, adapter: int) -> list[Places]:
        """Return the sets of additions that are needed of one adapter, each once."""
        return list(dict.fromkeys(line.ablation.active for line in self.lines if adapter in line.adapters))


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found for one line; see the formulas above. What is not defined is None.

    Attributes:
        kind: the question.
        name: the line's name within it.
        x: its place on the question's axis.
        projection: of a cell of the grid layer × projection.
        parameters: of the additions that act.
        adapters: by index.
        mean: of the measure.
        means: the same for each adapter.
        per_query: mean over the adapters, in the order of the study's queries.
        drop: and the others as above, each with its interval; those have none where there is a single query.
    """

    kind: str
    name: str
    x: float
    projection: str
    parameters: int
    adapters: tuple[int, ...]
    mean: float
    means: tuple[float, ...]
    per_query: tuple[float, ...] = field(repr=False)
    drop: float = 0.0
    drop_interval: Interval = None
    gain: float = 0.0
    gain_interval: Interval = None
    share: float | None = None
    share_interval: Interval = None
    recovered: float | None = None
    recovered_interval: Interval = None


@dataclass(frozen=True)
class Study:
    """A finished study.

    Attributes:
        study: layers, projections, components, ranks, checkpoints or losses.
        measure: its notation.
        collection: name of the collection and its split.
        depth: candidates of a query.
        queries: ids.
        subjects: the adapters, without their additions one by one.
        findings: line by line.
        full: name of the line that others are compared with.
        work: layers run, layers that would have been run without sharing states, and why some, or all, were not shared.
        made: provenance.
    """

    study: str
    measure: str
    collection: str
    depth: int
    queries: tuple[str, ...]
    subjects: tuple[dict[str, Any], ...]
    findings: tuple[Finding, ...]
    full: str
    work: dict[str, Any]
    made: dict[str, Any]

    def of(self, kind: str) -> list[Finding]:
        """Return the findings of one question."""
        return [each for each in self.findings if each.kind == kind]

    def find(self, name: str) -> Finding | None:
        """Return the finding of that name, where there is one."""
        return next((each for each in self.findings if each.name == name), None)

    def difference(self, one: str, other: str) -> tuple[float, Interval] | None:
        """Return the difference of two lines' measures with its interval; None where a line is missing."""
        pair = [found for found in (self.find(one), self.find(other)) if found is not None]
        if len(pair) < 2:
            return None
        _, found = compared(pair, [each["seed"] for each in self.subjects], full=one, none=one)
        return found.drop, found.drop_interval

    def compared_again(self) -> Study:
        """Return the study with all that follows from its lines' values taken from these anew."""
        seeds = [each["seed"] for each in self.subjects]
        return dataclasses.replace(self, findings=compared(self.findings, seeds, self.full))

    def as_dict(self) -> dict[str, Any]:
        """Return what JSON can hold."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, facts: Mapping[str, Any]) -> Study:
        """Return what `as_dict` gave, also after JSON."""

        def tuples(entry: Mapping[str, Any]) -> dict[str, Any]:
            return {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}

        found = tuples(facts)
        return cls(**(found | {"findings": tuple(Finding(**tuples(each)) for each in facts["findings"])}))


def bases(design: Design, subjects: Sequence[Subject]) -> dict[int, int]:
    """Return, of each adapter whose M(0) is needed, the first of them that is the same without additions."""
    first: dict[str, int] = {}
    return {
        index: first.setdefault(subjects[index].prompt, index) if subjects[index].only_additions else index
        for index in design.full.adapters
    }


def findings(design: Design, subjects: Sequence[Subject], values: Values) -> tuple[Finding, ...]:
    """Return what the values of all queries say of each line.

    Args:
        design: the lines.
        subjects: the adapters.
        values: by adapter and active additions, `[queries]`.
    """
    measured = [_measured(line, subjects, values) for line in design.lines]
    return compared(measured, [each.seed for each in subjects], design.full.ablation.name)


def compared(lines: Sequence[Finding], seeds: Sequence[int | None], full: str, none: str = NONE) -> tuple[Finding, ...]:
    """Return lines with all that follows from their measures: differences, shares and intervals.

    Args:
        lines: measured.
        seeds: of all adapters.
        full: name of the line of M(full).
        none: name of that of M(0).
    """
    places = {each.name: place for place, each in enumerate(lines)}
    per_query = np.array([each.per_query for each in lines])
    drawn = draws(per_query, [_by_seed(each, seeds) for each in lines])
    of_full, of_none = lines[places[full]].mean, lines[places[none]].mean
    drawn_full, drawn_none = drawn[places[full]], drawn[places[none]]
    several = per_query.shape[1] > 1
    return tuple(
        dataclasses.replace(
            line,
            drop=of_full - line.mean,
            drop_interval=interval(drawn_full - own) if several else None,
            gain=line.mean - of_none,
            gain_interval=interval(own - drawn_none) if several else None,
            share=_ratio(line.mean, of_full),
            share_interval=ratio_interval(own, drawn_full) if several else None,
            recovered=_ratio(line.mean - of_none, of_full - of_none),
            recovered_interval=ratio_interval(own - drawn_none, drawn_full - drawn_none) if several else None,
        )
        for line, own in zip(lines, drawn, strict=True)
    )


def _measured(line: Line, subjects: Sequence[Subject], values: Values) -> Finding:
    ablation = line.ablation
    own = np.array([values[index, ablation.active] for index in line.adapters])
    return Finding(
        kind=ablation.kind,
        name=ablation.name,
        x=ablation.x,
        projection=ablation.projection,
        parameters=sum(n for place, n in subjects[line.adapters[0]].places.items() if place in ablation.active),
        adapters=line.adapters,
        mean=float(own.mean()),
        means=tuple(float(mean) for mean in own.mean(axis=1)),
        per_query=tuple(round(float(value), 6) for value in own.mean(axis=0)),
    )


def _by_seed(line: Finding, seeds: Sequence[int | None]) -> dict[Hashable, float]:
    """Return means by seed; by adapter, where seeds are not known or one stands twice."""
    own = [seeds[index] for index in line.adapters]
    names: Sequence[Hashable] = (
        own if None not in own and len(set(own)) == len(own) else [f"#{i}" for i in line.adapters]
    )
    return dict(zip(names, line.means, strict=True))


def _ratio(above: float, below: float) -> float | None:
    return above / below if below > 0 else None
