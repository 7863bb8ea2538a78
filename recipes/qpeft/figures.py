"""The pictures of this recipe."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qpeft.evaluation.significance import bootstrap_interval

Rows = dict[str, list[dict[str, Any]]]
"""Name of a row → its cells, one per seed."""
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"
SIZED = {"qpeft_a": BLUE, "qpeft_r": ORANGE, "soft_prompt": GREEN}


class Zero(NamedTuple):
    """The model alone."""

    collection: str
    per_query: dict[str, dict[str, float]]
    """Measure → query id → value."""


def averaged(cells: list[dict[str, Any]], collection: str, measure: str, kind: str = "per_query") -> dict[str, float]:
    """Return query id → the measure's mean over seeds; `kind` is `mixed` for what was mixed with BM25."""
    values = [cell["test"][collection][kind][measure] for cell in cells]
    return {query: statistics.fmean(v[query] for v in values) for query in values[0]}


def gain(cells: list[dict[str, Any]], zero: Zero, measure: str) -> tuple[float, float, float]:
    """Return the mean difference from the model alone, and its 95 % bootstrap interval over queries."""
    own, alone = averaged(cells, zero.collection, measure), zero.per_query[measure]
    differences = np.array([own[query] - alone[query] for query in alone])
    low, high = bootstrap_interval(differences) or (0.0, 0.0)
    return float(differences.mean()), low, high


def gains(rows: Rows, zero: Zero, path: Path) -> None:
    """Draw each row's RR@10 against zero-shot: a dot per seed, the mean with a 95 % bootstrap interval over queries."""
    found = {name: gain(cells, zero, "RR@10") for name, cells in rows.items()}
    ordered = sorted(found, key=lambda name: found[name][0])
    drawing, axes = _drawing(7, 0.45 * len(rows) + 1.2)
    for place, name in enumerate(ordered):
        mean, low, high = found[name]
        axes.plot([low, high], [place, place], color=BLUE, linewidth=2)
        axes.plot(mean, place, "o", color=BLUE, markersize=8)
        for cell in rows[name]:
            axes.plot(gain([cell], zero, "RR@10")[0], place + 0.18, "o", color=ORANGE, markersize=3)
    axes.axvline(0, color="grey", linewidth=1)
    axes.set_yticks(range(len(ordered)), ordered)
    axes.set_xlabel(f"RR@10 on {zero.collection} minus zero-shot; line: 95 % over queries, small dots: seeds")
    drawing.savefig(path, dpi=130)


def parameters(rows: Rows, zero: Zero, path: Path) -> None:
    """Draw what rows gain over zero-shot against how many parameters they train."""
    drawing, axes = _drawing(7, 4.5)
    for name, cells in rows.items():
        if cells[0]["training_seconds"]:
            mean, low, high = gain(cells, zero, "RR@10")
            count = cells[0]["trained_parameters"]
            axes.errorbar(count, mean, [[mean - low], [high - mean]], fmt="o", color=BLUE, capsize=3)
            axes.annotate(name, (count, mean), xytext=(6, 3), textcoords="offset points", fontsize=8)
    axes.axhline(0, color="grey", linewidth=1)
    axes.set_xscale("log")
    axes.margins(x=0.2)
    axes.set_xlabel("trained parameters")
    axes.set_ylabel(f"RR@10 on {zero.collection} minus zero-shot, 95 % over queries")
    drawing.savefig(path, dpi=130)


def sizes(rows: Mapping[int, Rows], zero: Zero, path: Path) -> None:
    """Draw RR@10 and R@10 against the number of training queries."""
    drawing = Figure(figsize=(8, 3.6), layout="constrained")
    for axes, measure in zip(drawing.subplots(1, 2), ("RR@10", "R@10"), strict=True):
        for name, colour in SIZED.items():
            points = {count: gain(some[name], zero, measure) for count, some in rows.items() if name in some}
            if not points:
                continue
            means, lows, highs = zip(*points.values(), strict=True)
            axes.plot(list(points), means, "o-", color=colour, label=name)
            axes.fill_between(list(points), lows, highs, color=colour, alpha=0.12)
        axes.axhline(0, color="grey", linewidth=1)
        axes.set_xscale("log")
        axes.set_xticks(list(rows), [f"{count:,}" for count in rows])
        axes.minorticks_off()
        axes.set_xlabel("training queries")
        axes.set_ylabel(f"{measure} on {zero.collection} minus zero-shot")
        axes.spines[["top", "right"]].set_visible(False)
    drawing.axes[0].legend(frameon=False)
    drawing.savefig(path, dpi=130)


CONTROLS = {
    "Q-PEFT-A": {
        "qpeft_a": "as it is",
        "qpeft_c": "reads the model's states too",
        "untrained_a": "not trained",
        "shuffled_a": "reads another query",
    },
    "Q-PEFT-R": {"qpeft_r": "as it is", "untrained_r": "not trained: plain text", "random_k": "any passage words"},
    "without a query": {"passage_prompt": "reads the passage alone", "soft_prompt": "reads nothing"},
}
"""What is taken from the hint, or put into it."""


def ablations(rows: Rows, zero: Zero, path: Path) -> None:
    """Draw what is left of the gain in RR@10 over zero-shot when something of the hint is another."""
    found = {
        kind: {label: gain(rows[name], zero, "RR@10") for name, label in labels.items() if name in rows}
        for kind, labels in CONTROLS.items()
    }
    count = sum(map(len, found.values()))
    drawing, axes = _drawing(8, 0.4 * count + 1.4)
    names, place = [], 0
    for colour, (kind, some) in zip((BLUE, ORANGE, GREEN), found.items(), strict=True):
        for label, (mean, low, high) in some.items():
            axes.barh(place, mean, color=colour, alpha=1.0 if label == "as it is" else 0.45)
            axes.plot([low, high], [place, place], color="black", linewidth=1)
            names.append(f"{kind}: {label}")
            place += 1
    axes.axvline(0, color="grey", linewidth=1)
    axes.set_yticks(range(place), names)
    axes.invert_yaxis()
    axes.set_xlabel(f"RR@10 on {zero.collection} minus zero-shot\nline: 95 % over queries")
    drawing.savefig(path, dpi=130)


def _drawing(width: float, height: float) -> tuple[Figure, Axes]:
    drawing = Figure(figsize=(width, height), layout="constrained")
    axes = drawing.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return drawing, axes
