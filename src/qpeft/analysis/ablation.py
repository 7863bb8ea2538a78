"""Which additions of a LoRA adapter act: the ablations of a study, and an order in which they share work.

M(S) is a measure with only the additions of the set S acting (Nijasure, Chowdhury, Allan 2025, arXiv 2504.08780, ask
these questions of a pointwise reranker). Of an adapter with additions in L layers:

* layers: M(all but layer l), M(only layer l), windows of w neighbouring layers both ways, the lowest and highest n;
* projections: M(all but projection m), M(only m), over all layers; with the grid, also in each layer alone;
* components: M(only attention), M(only MLP), after the fact, on an adapter that was trained with both.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

from qpeft.adapters._lora_targets import PROJECTIONS, Place
from qpeft.errors import OptionError

Places = frozenset[Place]
ALL, NONE = "all additions", "no additions"


@dataclass(frozen=True, slots=True)
class Ablation:
    """A set of additions that act.

    Attributes:
        kind: the question it belongs to.
        name: its answer's name within the question.
        active: the additions that act.
        x: where it stands on the axis of its question.
        projection: of a cell of the grid layer × projection, whose `x` is the layer.
    """

    kind: str
    name: str
    active: Places
    x: float = 0.0
    projection: str = ""


def of_layers(places: Collection[Place], window: int) -> Iterator[Ablation]:
    """Yield the ablations by layer; names count layers from 1.

    Raises:
        OptionError: the window is not smaller than the number of layers that have additions.
    """
    whole = frozenset(places)
    layers = sorted({place.layer for place in places})
    if not 1 <= window < len(layers):
        raise OptionError(f"--window is {window}; the adapter has additions in {len(layers)} layers: take fewer")

    def within(chosen: Iterable[int]) -> Places:
        wanted = set(chosen)
        return frozenset(place for place in places if place.layer in wanted)

    for layer in layers:
        yield Ablation("all but one layer", f"without layer {layer + 1}", whole - within([layer]), layer + 1)
    for layer in layers:
        yield Ablation("one layer alone", f"layer {layer + 1}", within([layer]), layer + 1)
    for start in range(len(layers) - window + 1):
        some = layers[start : start + window]
        named, middle = f"{some[0] + 1}–{some[-1] + 1}", (some[0] + some[-1]) / 2 + 1
        yield Ablation("all but a window", f"without layers {named}", whole - within(some), middle)
        yield Ablation("a window alone", f"layers {named}", within(some), middle)
    for count in range(1, len(layers)):
        yield Ablation("from the bottom", f"lowest {count}", within(layers[:count]), count)
        yield Ablation("from the top", f"highest {count}", within(layers[-count:]), count)


def of_projections(places: Collection[Place], *, grid: bool = False) -> Iterator[Ablation]:
    """Yield the ablations by projection, and with `grid` those of each layer and projection."""
    whole = frozenset(places)
    names = [name for name in PROJECTIONS if any(place.projection == name for place in places)]
    for x, name in enumerate(names):
        some = frozenset(place for place in places if place.projection == name)
        yield Ablation("all but one projection", f"without {name}", whole - some, x)
        yield Ablation("one projection alone", name, some, x)
    if not grid:
        return
    for place in sorted(places, key=lambda place: (place.layer, PROJECTIONS.index(place.projection))):
        where = f"{place.projection} of layer {place.layer + 1}"
        one = frozenset([place])
        yield Ablation("grid, all but one", f"without {where}", whole - one, place.layer + 1, place.projection)
        yield Ablation("grid, one alone", where, one, place.layer + 1, place.projection)


def of_components(places: Collection[Place]) -> Iterator[Ablation]:
    """Yield attention alone and the MLP alone, for an adapter that has both."""
    for x, component in enumerate(("attention", "mlp")):
        some = frozenset(place for place in places if place.component == component)
        if some and some != frozenset(places):
            yield Ablation("one component acts", f"{component} of both", some, x)


@dataclass(frozen=True, slots=True)
class Step:
    """A run of the model: which additions act, how many first layers are as before, behind which states are kept."""

    active: Places
    shared: int
    keep: frozenset[int]


def plan(sets: Collection[Places], layers: int) -> list[Step]:
    """Return an order of sets, each once, in which as few layers as possible are run.

    The sets are leaves of a tree whose branches are the layers' active additions; the order is a walk of that tree,
    and states are kept where it will branch. Over L layers, leave-one-out takes L + L (L + 1) / 2 layers, where one by
    one it takes L (L + 1).
    """
    order = {name: rank for rank, name in enumerate(PROJECTIONS)}

    def path(active: Places) -> list[tuple[int, ...]]:
        found: list[list[int]] = [[] for _ in range(layers)]
        for place in active:
            found[place.layer].append(order[place.projection])
        return [tuple(sorted(names)) for names in found]

    paths = sorted(((path(active), active) for active in set(sets)), key=lambda item: item[0])
    shared = [0] + [_common(one, other) for (one, _), (other, _) in itertools.pairwise(paths)]
    keep: list[set[int]] = [set() for _ in paths]
    for run, depth in enumerate(shared):
        if depth:  # kept by the last run that went through that layer itself
            keep[max(before for before in range(run) if shared[before] < depth)].add(depth)
    return [Step(active, depth, frozenset(kept)) for (_, active), depth, kept in zip(paths, shared, keep, strict=True)]


def _common(one: Sequence[object], other: Sequence[object]) -> int:
    """Return how many entries agree before the first that does not."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), len(one))
