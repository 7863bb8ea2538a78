"""Figures: SVG text for an HTML page, and pictures beside an adapter.

Those of a page carry no text of the user's (names of runs stand in the page) and take the page's text colour for lines
and labels, so that they are readable on light and dark. The colours are Okabe and Ito's, apart for colour-blind eyes
too.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy import stats

from qpeft.atomic import replacing
from qpeft.errors import InputError
from qpeft.evaluation.calibration import Labels, Values, reliability

GAIN, LOSS = "#0072B2", "#D55E00"
SERIES = (
    ("#0072B2", "o", "●"),
    ("#D55E00", "s", "■"),
    ("#009E73", "^", "▲"),
    ("#CC79A7", "D", "◆"),
    ("#E69F00", "v", "▼"),
    ("#56B4E9", "P", "✚"),
)
"""Colour, matplotlib's marker and the same marker as a character, for the n-th run; repeated after the last."""

INK = "#010203"  # stands for the page's text colour until the SVG is written
STYLE: dict[Any, Any] = {
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10.0,
    "axes.unicode_minus": True,
    "font.sans-serif": ["Helvetica", "Arial", "DejaVu Sans"],
    "font.family": "sans-serif",
    "font.size": 9.0,
    "svg.fonttype": "none",
    "svg.hashsalt": "qpeft",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


def difference_bars(differences: Sequence[float], measure: str, name: str) -> str:
    """Draw the differences of all queries, largest gain first: one bar per query, gains and losses in two colours.

    Args:
        differences: value of the run − value of the baseline, per query.
        measure: notation, for the axis.
        name: prefix of the SVG's ids, unique on the page.
    """
    ordered = np.sort(np.asarray(differences, dtype=np.float64))[::-1]
    # neighbours of one height are drawn as one bar: most queries of a large collection do not differ
    edges = np.unique([0, *(np.flatnonzero(np.diff(ordered)) + 1), ordered.size])
    heights = ordered[edges[:-1]]
    reach = float(np.abs(ordered).max(initial=0.0)) or 1.0
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.6, 2.3), layout="constrained")
        axes = figure.add_subplot()
        axes.stairs(np.clip(heights, 0, None), edges, fill=True, color=GAIN)
        axes.stairs(np.clip(heights, None, 0), edges, fill=True, color=LOSS)
        axes.axhline(0, color=INK, linewidth=0.8)
        axes.set(xlim=(0, max(ordered.size, 1)), ylim=(-1.05 * reach, 1.05 * reach))
        axes.set(xlabel="queries, by difference", ylabel=f"difference in {measure}")
        axes.locator_params(axis="x", integer=True)
        grid(axes)
        return svg(figure, name)


def cutoff_curves(panels: Mapping[str, Mapping[str, Sequence[float | None]]], cutoffs: Sequence[int], name: str) -> str:
    """Draw measures over the cutoff k, a panel per measure, a line per run.

    Args:
        panels: measure → run → mean at each cutoff; None leaves a gap. Runs take the marks of `SERIES` in order.
        cutoffs: the values of k.
        name: prefix of the SVG's ids, unique on the page.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.6, 3.1), layout="constrained")
        for position, (measure, of_runs) in enumerate(panels.items(), start=1):
            axes = figure.add_subplot(1, len(panels), position)
            for index, means in enumerate(of_runs.values()):
                colour, marker, _ = SERIES[index % len(SERIES)]
                values = [np.nan if mean is None else mean for mean in means]
                axes.plot(cutoffs, values, color=colour, marker=marker, markersize=4.5, linewidth=1.4)
            axes.set(title=f"{measure}@k", xlabel="k", xticks=list(cutoffs))
            grid(axes)
        return svg(figure, name)


def training_curves(
    history: Sequence[Mapping[str, float]], measure: str, dev: Mapping[str, float | None], path: Path
) -> None:
    """Draw the loss over optimiser steps, and under it the dev measure, as a PNG; it appears whole or not at all.

    Args:
        history: what transformers' Trainer logged: entries with `step` and either `loss` or `eval_` + measure. Each
            loss is the mean since the entry before.
        measure: notation of the dev measure, for its key and its axis.
        dev: its value for the model alone (`zero_shot`), the `untrained` adapter and the `trained` one; those that are
            None are left out.
        path: where to write.

    Raises:
        InputError: the file cannot be made.
    """
    losses = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    measured = [(entry["step"], entry[f"eval_{measure}"]) for entry in history if f"eval_{measure}" in entry]
    last = max((step for step, _ in [*losses, *measured]), default=1)
    with_dev = bool(measured) or any(value is not None for value in dev.values())
    with_loss = bool(losses) or not with_dev
    panels = with_loss + with_dev
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 4.8 if panels == 2 else 2.9), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        rows = figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0]
        if with_loss:
            rows[0].plot(*_columns(losses), color=SERIES[0][0], linewidth=1.4, marker=_dots(losses), markersize=4)
            rows[0].set(ylabel="training loss")
        if with_dev:
            _dev_panel(rows[-1], measured, measure, dev)
        for axes in rows:
            grid(axes)
        rows[-1].set(xlabel="optimiser step", xlim=(0, 1.02 * last))
        rows[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
        save_png(figure, path)


def reliability_diagram(probabilities: Values, relevant: Labels, path: Path) -> None:
    """Draw what share of the pairs is relevant over what was promised, with how many pairs there are, as a PNG.

    The bins are of equal width, so that high probabilities, which few pairs have, are seen too. Bars are 95% Wilson
    intervals, as if pairs were independent. The file appears whole or not at all.

    Args:
        probabilities: `[N]`, of pairs that the calibration was not fitted on.
        relevant: `[N]`.
        path: where to write.

    Raises:
        InputError: the file cannot be made.
    """
    top = float(probabilities.max())
    bins = reliability(probabilities, relevant, np.linspace(0, top, 11)[1:-1])
    promised, found = [each.promised for each in bins], [each.relevant for each in bins]
    bars = [_reach(each.relevant, each.pairs) for each in bins]
    reach = max(top, *(share + above for share, (_, above) in zip(found, bars, strict=True)))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.6, 5.4), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        upper.plot([0, reach], [0, reach], color=INK, linewidth=0.8, linestyle=(0, (5, 2)), label="as promised")
        drawn = {"color": SERIES[0][0], "marker": "o", "markersize": 4.5, "linewidth": 1.4, "elinewidth": 0.9}
        upper.errorbar(promised, found, list(zip(*bars, strict=True)), label="found", **drawn)
        upper.set(ylabel="share that is relevant", ylim=(0, 1.02 * reach))
        upper.legend(frameon=False, loc="upper left")
        edges = np.linspace(0, top, 41)
        for which, (colour, _, _), label in ((~relevant, SERIES[4], "others"), (relevant, SERIES[2], "relevant")):
            lower.hist(probabilities[which], edges, color=colour, alpha=0.75, label=label, log=True)
        lower.set(xlabel="calibrated probability", ylabel="pairs", xlim=(0, 1.02 * top))
        lower.legend(frameon=False, fontsize=8)
        for axes in (upper, lower):
            grid(axes)
        save_png(figure, path)


def _reach(share: float, count: int) -> tuple[float, float]:
    """Return how far the 95 % interval of a share reaches below and above it (Wilson 1927)."""
    found = stats.binomtest(round(share * count), count).proportion_ci(method="wilson")
    return max(share - found.low, 0.0), max(found.high - share, 0.0)


def _dev_panel(
    axes: Axes, measured: Sequence[tuple[float, float]], measure: str, dev: Mapping[str, float | None]
) -> None:
    if measured:
        axes.plot(*_columns(measured), color=SERIES[2][0], linewidth=1.4, marker="o", markersize=4, label="in training")
    for name, label, colour, dashes in (
        ("untrained", "untrained adapter", SERIES[4][0], (0, (1, 1.5))),
        ("zero_shot", "model alone", INK, (0, (5, 2))),
    ):
        value = dev.get(name)
        if value is not None:
            axes.axhline(value, color=colour, linewidth=1.4, linestyle=dashes, label=f"{label} {value:.4f}")
    kept = dev.get("trained")
    if kept is not None and measured:
        step, _ = min(measured, key=lambda point: abs(point[1] - kept))
        axes.plot([step], [kept], "o", markersize=9, fillstyle="none", color=SERIES[2][0], label=f"kept {kept:.4f}")
    axes.set(ylabel=f"dev {measure}")
    axes.margins(y=0.12)
    axes.legend(ncols=2, frameon=False, fontsize=8, handlelength=2.6, loc="upper center", bbox_to_anchor=(0.5, -0.25))


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _dots(points: Sequence[tuple[float, float]]) -> str:
    return "o" if len(points) <= 15 else ""


def grid(axes: Axes) -> None:
    """Draw faint lines at the values, behind what is drawn."""
    axes.grid(axis="y", color=INK, alpha=0.15, linewidth=0.8)
    axes.set_axisbelow(True)


def save_png(figure: Figure, path: Path, dpi: float | Literal["figure"] = "figure") -> None:
    """Write a figure, which appears whole or not at all.

    Raises:
        InputError: it cannot be written.
    """
    with replacing(path) as temporary:
        try:
            figure.savefig(temporary, format="png", metadata={"Software": None}, dpi=dpi)
        except OSError as error:
            raise InputError(f"{path} cannot be written: {error.strerror}") from error


def svg(figure: Figure, name: str) -> str:
    """Return a figure as SVG text in the page's text colour; `name` is the prefix of its ids, unique on the page."""
    out = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    FigureCanvasSVG(figure)
    figure.savefig(out, format="svg", transparent=True, metadata=nothing)
    text = out.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
