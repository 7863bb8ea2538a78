"""Figures of a study. Bands and bars are its intervals: of the paired difference to the line that a value is read from.

What is left out is read from M(full), what is left alone from M(0); both are drawn as horizontal lines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from qpeft.adapters._lora_targets import PROJECTIONS
from qpeft.analysis.ablation import NONE
from qpeft.analysis.plots import INK, SERIES, STYLE, grid, save_png, svg
from qpeft.analysis.study import Finding, Study
from qpeft.analysis.study_intervals import Interval, is_clear
from qpeft.data.files import write_text

From = Literal["full", "none"]


@dataclass(frozen=True, slots=True)
class Drawn:
    """A figure that was written as PNG and SVG; `svg` is for a page, `title` for the heading above it."""

    name: str
    title: str
    svg: str


def write_figures(study: Study, folder: Path) -> list[Drawn]:
    """Draw what belongs to a study into a folder, each figure as PNG and SVG.

    Raises:
        InputError: a file cannot be made.
    """
    found = []
    with matplotlib.rc_context(STYLE):
        for name, title, figure in _figures(study):
            text = svg(figure, name)
            FigureCanvasAgg(figure)
            save_png(figure, folder / f"{name}.png", dpi=150)
            with write_text(folder / f"{name}.svg") as file:
                file.write(text)
            found.append(Drawn(name, title, text))
    return found


def _figures(study: Study) -> Iterator[tuple[str, str, Figure]]:
    draw: dict[str, Callable[[Study], Iterator[tuple[str, str, Figure]]]] = {
        "layers": _layers,
        "projections": _projections,
        "components": _components,
        "ranks": _ranks,
        "checkpoints": _checkpoints,
        "losses": _losses,
    }
    yield from draw[study.study](study)


def _layers(study: Study) -> Iterator[tuple[str, str, Figure]]:
    for name, title, label, kinds in (
        ("layers", "Layer by layer", "layer", ("all but one layer", "one layer alone")),
        ("windows", "Windows of layers", "middle of the window", ("all but a window", "a window alone")),
    ):
        figure, axes = _panel()
        for place, kind in enumerate(kinds):
            _series(axes, study.of(kind), place, kind, "full" if place == 0 else "none")
        _finish(axes, study, label)
        yield name, title, figure
    figure, axes = _panel()
    for place, kind in enumerate(("from the bottom", "from the top")):
        _series(axes, study.of(kind), place, kind, "none")
    _finish(axes, study, "layers whose additions act")
    yield "cumulative", "From the bottom and from the top", figure


def _projections(study: Study) -> Iterator[tuple[str, str, Figure]]:
    figure, axes = _panel()
    for place, kind in enumerate(("all but one projection", "one projection alone")):
        _series(axes, study.of(kind), place, kind, "full" if place == 0 else "none", line=False)
    alone = study.of("one projection alone")
    _finish(axes, study, "projection", ticks=[(each.x, each.name) for each in alone])
    yield "projections", "By projection", figure
    if study.of("grid, one alone"):
        yield "grid", "Layer by projection", _heat_maps(study)


def _components(study: Study) -> Iterator[tuple[str, str, Figure]]:
    yield "components", "Attention and the MLP", _gains(study, ("one component acts", "trained with"))


def _losses(study: Study) -> Iterator[tuple[str, str, Figure]]:
    yield "losses", "By loss", _gains(study, ("loss",))


def _gains(study: Study, kinds: Sequence[str]) -> Figure:
    ordered = [each for kind in kinds for each in reversed(study.of(kind))]
    figure = Figure(figsize=(7.2, 0.5 * len(ordered) + 1.1), layout="constrained")
    axes = figure.add_subplot()
    for y, each in enumerate(ordered):
        low, high = each.gain_interval or (each.gain, each.gain)
        colour, marker, _ = SERIES[1 if each.kind == "one component acts" else 0]
        axes.plot([low, high], [y, y], color=colour, linewidth=1.6)
        axes.plot([each.gain], [y], marker, color=colour, markersize=7)
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_yticks(range(len(ordered)), [each.name for each in ordered])
    axes.set(xlabel=f"gain in {study.measure} over no additions", ylim=(-0.6, len(ordered) - 0.4))
    axes.grid(axis="x", color=INK, alpha=0.15, linewidth=0.8)
    return figure


def _ranks(study: Study) -> Iterator[tuple[str, str, Figure]]:
    found = study.of("rank")
    figure, axes = _panel()
    _series(axes, found, 0, "all additions", "none")
    axes.set_xscale("log", base=2)
    _finish(axes, study, "rank", ticks=[(each.x, f"{each.x:g}") for each in found])
    axes.minorticks_off()
    yield "ranks", "By rank", figure


def _checkpoints(study: Study) -> Iterator[tuple[str, str, Figure]]:
    figure, axes = _panel()
    _series(axes, study.of("step"), 0, "all additions", "none")
    _finish(axes, study, "optimiser step")
    yield "checkpoints", "Over training", figure


def _panel() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7.2, 3.3), layout="constrained")
    return figure, figure.subplots()


def _series(axes: Axes, found: Sequence[Finding], place: int, label: str, read_from: From, line: bool = True) -> None:
    """Draw values with their intervals, and the seeds as faint dots where there are several."""
    colour, marker, _ = SERIES[place]
    ordered = sorted(found, key=lambda each: each.x)
    shift = 0.0 if line else 0.12 * (2 * place - 1)
    x = [each.x + shift for each in ordered]
    means = [each.mean for each in ordered]
    bounds = [_around(each, read_from) for each in ordered]
    low, high = [each[0] for each in bounds], [each[1] for each in bounds]
    if line:
        axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
    else:
        axes.vlines(x, low, high, color=colour, linewidth=1.6)
    style: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 4.5, "label": label}
    axes.plot(x, means, linewidth=1.4 if line else 0, **style)
    for each, at in zip(ordered, x, strict=True):
        if len(each.means) > 1:
            axes.plot([at] * len(each.means), each.means, ".", color=colour, markersize=3, alpha=0.6)


def _around(each: Finding, read_from: From) -> tuple[float, float]:
    """Return an interval around a mean, as wide as that of its difference to what it is read from."""
    if read_from == "full":
        low, high = each.drop_interval or (each.drop, each.drop)
        full = each.mean + each.drop
        return full - high, full - low
    low, high = each.gain_interval or (each.gain, each.gain)
    return each.mean - each.gain + low, each.mean - each.gain + high


def _finish(axes: Axes, study: Study, label: str, ticks: Sequence[tuple[float, str]] = ()) -> None:
    for name, dashes in ((study.full, (0, (5, 2))), (NONE, (0, (1, 1.5)))):
        found = study.find(name)
        if found is not None:
            axes.axhline(found.mean, color=INK, linewidth=0.9, linestyle=dashes, label=f"{name} {found.mean:.3f}")
    axes.set(xlabel=label, ylabel=study.measure)
    if ticks:
        axes.set_xticks(*zip(*ticks, strict=True))
    else:
        axes.locator_params(axis="x", integer=True)
    grid(axes)
    axes.margins(y=0.1)
    axes.legend(ncols=2, frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.2))


def _heat_maps(study: Study) -> Figure:
    """Draw layers × projections twice: the gain of one addition alone, and the drop without it; ∗: interval off 0."""
    alone, without = study.of("grid, one alone"), study.of("grid, all but one")
    columns = [name for name in PROJECTIONS if any(each.projection == name for each in alone)]
    rows = sorted({int(each.x) for each in alone})
    figure = Figure(figsize=(7.6, 0.36 * len(rows) + 1.6), layout="constrained")
    panels: tuple[tuple[str, list[Finding], Callable[[Finding], tuple[float, Interval]]], ...] = (
        ("gain of one alone", alone, lambda each: (each.gain, each.gain_interval)),
        ("drop without it", without, lambda each: (each.drop, each.drop_interval)),
    )
    for place, (title, found, value) in enumerate(panels, start=1):
        axes = figure.add_subplot(1, 2, place)
        table = np.full((len(rows), len(columns)), np.nan)
        reach = max((abs(value(each)[0]) for each in found), default=0.0) or 1.0
        for each in found:
            row, column = rows.index(int(each.x)), columns.index(each.projection)
            table[row, column], bounds = value(each)
            text = f"{table[row, column]:+.3f}{'∗' * is_clear(bounds)}".replace("-", "−")
            ink = "white" if abs(table[row, column]) > 0.6 * reach else "black"
            axes.text(column, row, text, ha="center", va="center", fontsize=6, color=ink)
        across, up = np.arange(len(columns) + 1) - 0.5, np.arange(len(rows) + 1) - 0.5
        axes.pcolormesh(across, up, table, cmap="PuOr_r", norm=TwoSlopeNorm(0, -reach, reach))
        axes.set_xticks(range(len(columns)), columns)
        axes.set_yticks(range(len(rows)), [str(row) for row in rows])
        axes.set(title=f"{title}, {study.measure}", xlabel="projection", ylabel="layer")
    return figure
