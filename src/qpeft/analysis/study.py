"""Studies of where relevance is learned: what is compared, and what was found.

A study asks what a measure is when only some additions of some adapters act, on the same candidates. Adapters that
differ by seed alone are averaged, query by query; intervals are 95 % bootstrap intervals over queries, of paired
differences. With M(0) for no additions, M(c) for some and M(full) for all:

    drop M(full) − M(c)      gain M(c) − M(0)      share M(c) / M(full)      recovered (M(c) − M(0)) / (M(full) − M(0))

The share of the measure flatters: M(0) is seldom near 0. The share of the gain does not. M(0) keeps whatever else an
adapter has, such as a score head, and is taken of the same adapters as M(c).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qpeft.adapters._lora_targets import Place
from qpeft.analysis.ablation import ALL, NONE, Ablation, Places, of_components, of_layers, of_projections
from qpeft.errors import OptionError
from qpeft.evaluation.significance import Floats, bootstrap_interval, ratio_interval

Interval = tuple[float, float] | None
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
        prompt: fingerprint of how input is written, if the adapter has nothing but additions: then two that agree in it
            are the same without additions. None otherwise.
        method: that it was trained for.
    """

    folder: str
    sha256: str
    rank: int
    seed: int | None
    places: Mapping[Place, int]
    step: int | None = None
    prompt: str | None = None
    method: str = "query_likelihood"

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
    """What a study measures; `full` is the line that the others are compared with, where there is one."""

    study: str
    lines: tuple[Line, ...]
    full: Line | None

    def sets(self, adapter: int) -> list[Places]:
        """Return the sets of additions that are needed of one adapter, each once; the empty one always is."""
        active = (line.ablation.active for line in self.lines if adapter in line.adapters)
        return list(dict.fromkeys([frozenset(), *active]))


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found for one line; see the formulas above. What does not apply, or is not defined, is None.

    Attributes:
        kind: the question.
        name: the line's name within it.
        x: its place on the question's axis.
        projection: of a cell of the grid layer × projection.
        parameters: of the additions that act.
        adapters: by index.
        mean: of the measure.
        means: the same for each adapter.
        drop: and the others as above, each with its interval.
        per_query: mean over the adapters, in the order of the study's queries.
    """

    kind: str
    name: str
    x: float
    projection: str
    parameters: int
    adapters: tuple[int, ...]
    mean: float
    means: tuple[float, ...]
    drop: float | None
    drop_interval: Interval
    gain: float
    gain_interval: Interval
    share: float | None
    share_interval: Interval
    recovered: float | None
    recovered_interval: Interval
    per_query: tuple[float, ...] = field(repr=False)


@dataclass(frozen=True)
class Study:
    """A finished study.

    Attributes:
        study: layers, projections, components, ranks or checkpoints.
        measure: its notation.
        collection: name of the collection and its split.
        depth: candidates of a query.
        queries: ids.
        subjects: the adapters, without their additions one by one.
        findings: line by line.
        full: name of the line that others are compared with; empty where there is none.
        work: layers run, layers that would have been run without sharing states, and why there was none.
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


def bases(subjects: Sequence[Subject]) -> list[int]:
    """Return for each adapter the first one that is the same without additions; itself, if no other is."""
    first: dict[str, int] = {}
    return [
        index if subject.prompt is None else first.setdefault(subject.prompt, index)
        for index, subject in enumerate(subjects)
    ]


def layers(subjects: Sequence[Subject], window: int) -> Design:
    """Return the study of layers; all adapters are seeds of one.

    Raises:
        OptionError: adapters with additions in different places, or a window that is too large.
    """
    every = _alike(subjects, range(len(subjects)))
    places = subjects[0].places
    return _ablations("layers", [Line(each, every) for each in of_layers(places, window)], subjects[0], every)


def projections(subjects: Sequence[Subject], grid: bool) -> Design:
    """Return the study of projections; all adapters are seeds of one.

    Raises:
        OptionError: adapters with additions in different places.
    """
    every = _alike(subjects, range(len(subjects)))
    lines = [Line(each, every) for each in of_projections(subjects[0].places, grid=grid)]
    return _ablations("projections", lines, subjects[0], every)


def components(subjects: Sequence[Subject]) -> Design:
    """Return the study of components: adapters trained with attention, the MLP or both, grouped by that and by rank.

    Of those trained with both, the two components are also measured alone.

    Raises:
        OptionError: adapters with both components of several ranks, or none; or places differ within a group.
    """
    groups = _groups(subjects, lambda each: (each.component, each.rank))
    full = [key for key in groups if key[0] == "both"]
    if len(full) != 1:
        found = ", ".join(str(rank) for _, rank in full) or "none"
        raise OptionError(f"components: give adapters trained with both components, all of one rank; ranks: {found}")
    lines = []
    order = {"both": 0, "attention": 1, "mlp": 2}
    for x, (key, members) in enumerate(sorted(groups.items(), key=lambda item: (order[item[0][0]], item[0][1]))):
        component, rank = key
        places = frozenset(subjects[members[0]].places)
        lines.append(Line(Ablation("trained with", f"trained: {component}, rank {rank}", places, x), members))
    both = groups[full[0]]
    lines += [Line(each, both) for each in of_components(subjects[both[0]].places)]
    return Design("components", (*lines, Line(Ablation("reference", NONE, frozenset()), both)), lines[0])


def ranks(subjects: Sequence[Subject]) -> Design:
    """Return the study of ranks; they are compared with the highest.

    Raises:
        OptionError: fewer than two ranks, or adapters with additions in different places.
    """
    _alike(subjects, range(len(subjects)))
    groups = _groups(subjects, lambda each: each.rank)
    if len(groups) < 2:
        raise OptionError(f"ranks: all adapters have rank {subjects[0].rank}; give --adapter of several")
    places = frozenset(subjects[0].places)
    lines = [Line(Ablation("rank", f"rank {rank}", places, rank), members) for rank, members in sorted(groups.items())]
    return _with_none("ranks", lines, lines[-1])


def checkpoints(subjects: Sequence[Subject]) -> Design:
    """Return the study of steps; they are compared with the last.

    Raises:
        OptionError: fewer than two steps, adapters whose steps differ, or additions in different places.
    """
    _alike(subjects, range(len(subjects)))
    groups = _groups(subjects, lambda each: -1 if each.step is None else each.step)
    if len(groups) < 2:
        raise OptionError("checkpoints: give folders with the states of several steps (qpeft train --keep-every)")
    sizes = {step: len(members) for step, members in groups.items()}
    if len(set(sizes.values())) > 1:
        odd = min(sizes, key=lambda step: (sizes[step], step))
        raise OptionError(f"checkpoints: step {odd} is not there for every adapter")
    places = frozenset(subjects[0].places)
    lines = [Line(Ablation("step", f"step {step}", places, step), members) for step, members in sorted(groups.items())]
    return _with_none("checkpoints", lines, lines[-1])


def findings(design: Design, subjects: Sequence[Subject], values: Values) -> tuple[Finding, ...]:
    """Return what the values of all queries say of each line.

    Args:
        design: the lines.
        subjects: the adapters.
        values: by adapter and active additions, `[queries]`.
    """
    full = None if design.full is None else _mean(values, design.full.adapters, design.full.ablation.active)
    full_gain = None
    if design.full is not None and full is not None:
        full_gain = full - _mean(values, design.full.adapters, frozenset())
    return tuple(_finding(line, subjects, values, full, full_gain) for line in design.lines)


def _finding(
    line: Line, subjects: Sequence[Subject], values: Values, full: Floats | None, full_gain: Floats | None
) -> Finding:
    ablation = line.ablation
    own = _mean(values, line.adapters, ablation.active)
    gain = own - _mean(values, line.adapters, frozenset())
    drop = None if full is None else full - own
    places = subjects[line.adapters[0]].places
    return Finding(
        kind=ablation.kind,
        name=ablation.name,
        x=ablation.x,
        projection=ablation.projection,
        parameters=sum(count for place, count in places.items() if place in ablation.active),
        adapters=line.adapters,
        mean=float(own.mean()),
        means=tuple(float(values[index, ablation.active].mean()) for index in line.adapters),
        drop=None if drop is None else float(drop.mean()),
        drop_interval=None if drop is None else bootstrap_interval(drop),
        gain=float(gain.mean()),
        gain_interval=bootstrap_interval(gain),
        share=_ratio(own, full),
        share_interval=None if full is None else ratio_interval(own, full),
        recovered=_ratio(gain, full_gain),
        recovered_interval=None if full_gain is None else ratio_interval(gain, full_gain),
        per_query=tuple(round(float(value), 6) for value in own),
    )


def _ratio(above: Floats, below: Floats | None) -> float | None:
    return None if below is None or below.mean() <= 0 else float(above.mean() / below.mean())


def _mean(values: Values, adapters: Sequence[int], active: Places) -> Floats:
    mean: Floats = np.mean([values[index, active] for index in adapters], axis=0)
    return mean


def _ablations(study: str, lines: Sequence[Line], subject: Subject, every: tuple[int, ...]) -> Design:
    full = Line(Ablation("reference", ALL, frozenset(subject.places)), every)
    return _with_none(study, [full, *lines], full)


def _with_none(study: str, lines: Sequence[Line], full: Line) -> Design:
    return Design(study, (*lines, Line(Ablation("reference", NONE, frozenset()), full.adapters)), full)


def _groups(subjects: Sequence[Subject], key: Any) -> dict[Any, tuple[int, ...]]:
    groups: dict[Any, list[int]] = {}
    for index, subject in enumerate(subjects):
        groups.setdefault(key(subject), []).append(index)
    return {name: _alike(subjects, members) for name, members in groups.items()}


def _alike(subjects: Sequence[Subject], members: Sequence[int]) -> tuple[int, ...]:
    first = subjects[members[0]]
    for index in members:
        if set(subjects[index].places) != set(first.places):
            raise OptionError(f"{subjects[index].folder} has additions at other places than {first.folder}")
    return tuple(members)
