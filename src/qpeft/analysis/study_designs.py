"""The studies: which adapters are seeds of one training, which lines there are, and what they are compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qpeft.analysis.ablation import ALL, NONE, Ablation, of_components, of_layers, of_projections
from qpeft.analysis.study import Design, Line, Subject
from qpeft.errors import OptionError

TRAITS: Mapping[str, Callable[[Subject], Any]] = {
    "additions at other places": lambda each: set(each.places),
    "another rank": lambda each: (each.rank, dict(each.places)),
    "another scale (alpha / rank)": lambda each: each.scales,
    "another method": lambda each: each.method,
    "another template, answers or passage length": lambda each: each.prompt,
    "another loss": lambda each: each.loss,
}
"""What seeds of one training have in common; None where it is not known."""
PLACES, RANK, SCALE, METHOD, PROMPT, LOSS = TRAITS


def layers(subjects: Sequence[Subject], window: int) -> Design:
    """Return the study of layers; all adapters are seeds of one.

    Raises:
        OptionError: adapters that differ in more than the seed, one given twice, or a window that is too large.
    """
    every = _seeds(subjects, range(len(subjects)))
    lines = [Line(each, every) for each in of_layers(subjects[0].places, window)]
    return _ablations("layers", lines, subjects[0], every)


def projections(subjects: Sequence[Subject], grid: bool) -> Design:
    """Return the study of projections; all adapters are seeds of one.

    Raises:
        OptionError: adapters that differ in more than the seed, or one given twice.
    """
    every = _seeds(subjects, range(len(subjects)))
    lines = [Line(each, every) for each in of_projections(subjects[0].places, grid=grid)]
    return _ablations("projections", lines, subjects[0], every)


def components(subjects: Sequence[Subject]) -> Design:
    """Return the study of components: adapters trained with attention, the MLP or both, grouped by that and by rank.

    Of those trained with both, the two components are also measured alone.

    Raises:
        OptionError: adapters with both components of several ranks, or none; or that differ in more than these and the
            seed.
    """
    groups = _groups(subjects, lambda each: (each.component, each.rank), besides=(PLACES, RANK, SCALE))
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
    return _with_none("components", lines, lines[0])


def ranks(subjects: Sequence[Subject]) -> Design:
    """Return the study of ranks; they are compared with the highest.

    Raises:
        OptionError: fewer than two ranks, or adapters that differ in more than rank, scale and seed.
    """
    groups = _groups(subjects, lambda each: each.rank, besides=(RANK, SCALE))
    if len(groups) < 2:
        raise OptionError(f"ranks: all adapters have rank {subjects[0].rank}; give --adapter of several")
    return _trained("ranks", "rank", {f"rank {rank}": (rank, groups[rank]) for rank in sorted(groups)}, subjects)


def checkpoints(subjects: Sequence[Subject]) -> Design:
    """Return the study of steps; they are compared with the last.

    Raises:
        OptionError: fewer than two steps, adapters whose steps differ, or that differ in more than step and seed.
    """
    groups = _groups(subjects, lambda each: -1 if each.step is None else each.step, besides=())
    if len(groups) < 2:
        raise OptionError("checkpoints: give folders with the states of several steps (qpeft train --keep-every)")
    sizes = {step: len(members) for step, members in groups.items()}
    if len(set(sizes.values())) > 1:
        odd = min(sizes, key=lambda step: (sizes[step], step))
        raise OptionError(f"checkpoints: step {odd} is not there for every adapter")
    return _trained("checkpoints", "step", {f"step {step}": (step, groups[step]) for step in sorted(groups)}, subjects)


def losses(subjects: Sequence[Subject]) -> Design:
    """Return the study of losses; they are compared with that of the adapter that is given first, which stands last.

    Raises:
        OptionError: fewer than two losses, an adapter that does not say which, or adapters that differ in more than
            loss and seed.
    """
    for each in subjects:
        if each.loss is None:
            raise OptionError(f"losses: {each.folder} does not say with which loss it was trained")
    groups = _groups(subjects, lambda each: each.loss, besides=(LOSS,))
    if len(groups) < 2:
        raise OptionError(f"losses: all adapters were trained with {subjects[0].loss}; give --adapter of several")
    lines = {f"loss {loss}": (x, members) for x, (loss, members) in enumerate(reversed(groups.items()))}
    return _trained("losses", "loss", lines, subjects)


def _trained(
    study: str, kind: str, groups: Mapping[str, tuple[int, tuple[int, ...]]], subjects: Sequence[Subject]
) -> Design:
    """Return a study whose adapters act whole; by name, each group's place on the axis and its adapters."""
    places = frozenset(subjects[0].places)
    lines = [Line(Ablation(kind, name, places, x), members) for name, (x, members) in groups.items()]
    return _with_none(study, lines, lines[-1])


def _ablations(study: str, lines: Sequence[Line], subject: Subject, every: tuple[int, ...]) -> Design:
    full = Line(Ablation("reference", ALL, frozenset(subject.places)), every)
    return _with_none(study, [full, *lines], full)


def _with_none(study: str, lines: Sequence[Line], full: Line) -> Design:
    return Design(study, (*lines, Line(Ablation("reference", NONE, frozenset()), full.adapters)), full)


def _groups(
    subjects: Sequence[Subject], key: Callable[[Subject], Any], besides: Sequence[str]
) -> dict[Any, tuple[int, ...]]:
    """Return adapters by what is compared. Groups may differ in `besides` too; their members by seed alone."""
    for other in subjects[1:]:
        _check_alike(subjects[0], other, [trait for trait in TRAITS if trait not in besides], "they are not comparable")
    groups: dict[Any, list[int]] = {}
    for index, subject in enumerate(subjects):
        groups.setdefault(key(subject), []).append(index)
    return {name: _seeds(subjects, members) for name, members in groups.items()}


def _seeds(subjects: Sequence[Subject], members: Sequence[int]) -> tuple[int, ...]:
    known: dict[str, Subject] = {}
    for index in members:
        own = subjects[index]
        _check_alike(subjects[members[0]], own, list(TRAITS), "they are not seeds of one training")
        twin = known.setdefault(own.sha256, own)
        if twin is not own:
            raise OptionError(f"{own.folder} has the weights of {twin.folder}; give each adapter once")
    return tuple(members)


def _check_alike(first: Subject, other: Subject, traits: Sequence[str], so: str) -> None:
    for trait in traits:
        one, two = TRAITS[trait](first), TRAITS[trait](other)
        if None not in (one, two) and one != two:
            raise OptionError(f"{other.folder} has {trait} than {first.folder}: {so}")
