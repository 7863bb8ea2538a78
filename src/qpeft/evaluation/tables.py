"""Evaluations and comparisons as tables, not yet in a format: rounded, marked for significance, with a legend."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # so that formatting a number does not import statistics
    from qpeft.evaluation.cost import Cost
    from qpeft.evaluation.measures import Evaluation
    from qpeft.evaluation.significance import Comparison, Test

BETTER, WORSE = "▲", "▼"
TEST_NAMES = {
    "t": "paired t-test",
    "wilcoxon": "Wilcoxon signed-rank test",
    "permutation": "sign-flip permutation test",
}


@dataclass(frozen=True, slots=True)
class Cell:
    """An entry of a table: its text, a mark of significance, and whether it is the best of its column."""

    text: str
    mark: str = ""
    best: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """A table before it takes a format; the first `names` columns hold names, the others numbers."""

    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...]
    names: int = 1


def measure_table(
    evaluations: Sequence[Evaluation],
    comparisons: Sequence[Comparison] = (),
    *,
    test: Test = "t",
    alpha: float = 0.05,
    digits: int = 4,
) -> Table:
    """Return runs × measures, marked where a run differs significantly from the baseline of `comparisons`.

    Where several baselines are compared with (all pairs), the marks are about the first; the p-values stay corrected
    over all.
    """
    measures = tuple(dict.fromkeys(measure for each in evaluations for measure in each.measures))
    marks = significance_marks(comparisons, test, alpha)
    means = [[each.means.get(measure) for measure in measures] for each in evaluations]
    texts = [[number(mean, digits) for mean in of_run] for of_run in means]
    columns = zip(*means, strict=True)
    best = [number(max((mean for mean in column if mean is not None), default=None), digits) for column in columns]
    rows = tuple(
        (
            Cell(each.run),
            *(
                Cell(text, marks.get((each.run, measure), ""), text == top and len(evaluations) > 1)
                for text, measure, top in zip(of_run, measures, best, strict=True)
            ),
        )
        for each, of_run in zip(evaluations, texts, strict=True)
    )
    return Table(("run", *measures), rows, tuple(measure_notes(evaluations, comparisons, test, alpha)))


def comparison_table(
    comparisons: Sequence[Comparison], *, test: Test = "t", alpha: float = 0.05, digits: int = 4
) -> Table:
    """Return one row per comparison: difference, interval, wins / ties / losses, p raw and corrected."""
    rows = tuple(
        (
            Cell(each.run),
            Cell(each.baseline),
            Cell(each.measure),
            Cell(number(each.difference, digits, signed=True), _mark(each, test, alpha)),
            Cell(interval(each.interval, digits, signed=True)),
            Cell(f"{each.wins}/{each.ties}/{each.losses}"),
            Cell(p_value(each.p_values[test])),
            Cell(p_value(each.corrected[test])),
        )
        for each in comparisons
    )
    header = ("run", "against", "measure", "difference", "interval", "win/tie/loss", "p", "p (Holm)")
    note = f"p: {TEST_NAMES[test]}, two-sided; {correction(comparisons)}; 95% bootstrap interval over queries"
    return Table(header, rows, (note,), names=3)


def cost_table(evaluations: Sequence[Evaluation], costs: Mapping[str, Cost]) -> Table:
    """Return one row per run: speed, work, what the first measure gained for it, memory; `–` where it is not known.

    Args:
        evaluations: of the runs.
        costs: by tag of the run.
    """
    measure = evaluations[0].measures[0]
    rows = []
    for each in evaluations:
        cost = costs.get(each.run)
        values = [None] * 9 if cost is None else _cost_values(cost, each.mean_of_ranked(measure))
        rows.append((Cell(each.run), *(Cell(rounded(value)) for value in values)))
    header = (
        "run", "passages/s", "tokens/s", "padding %", "cached %", "TFLOP/query", "QPP", f"RPP {measure}",
        "peak MiB", "peak GPU MiB",
    )  # fmt: skip
    note = f"QPP: queries per PetaFLOP; RPP: {measure} per PetaFLOP; without the first stage's work and adapters' own"
    return Table(header, tuple(rows), (note,))


def _cost_values(cost: Cost, mean: float | None) -> list[float | None]:
    def scaled(value: float | None, factor: float) -> float | None:
        return None if value is None else value * factor

    return [
        cost.passages_per_second,
        cost.tokens_per_second,
        scaled(cost.padded_share, 100),
        scaled(cost.cache_hit_rate, 100),
        cost.teraflops_per_query,
        cost.queries_per_petaflop,
        cost.quality_per_petaflop(mean),
        scaled(cost.peak_memory, 2**-20),
        scaled(cost.peak_device_memory, 2**-20),
    ]


def measure_notes(
    evaluations: Sequence[Evaluation], comparisons: Sequence[Comparison], test: Test, alpha: float
) -> list[str]:
    """Return the legend of a table of measures: number of queries, what the marks mean, queries not ranked."""
    counts = sorted({len(each.queries) for each in evaluations})
    notes = [f"{' or '.join(map(str, counts))} queries; a query that a run does not rank scores 0"]
    notes += [f"{each.run} does not rank {len(each.unranked)} of them" for each in evaluations if each.unranked]
    for measure in dict.fromkeys(measure for each in evaluations for measure in each.measures):
        counts = sorted({len(each.per_query[measure]) for each in evaluations if measure in each.per_query})
        if "_clean" in measure:
            notes.append(f"{measure}: over the {' or '.join(map(str, counts))} queries with a relevant candidate")
    if comparisons:
        notes.append(
            f"{BETTER} better, {WORSE} worse than {comparisons[0].baseline}: {TEST_NAMES[test]}, p ≤ {alpha:g}, "
            + correction(comparisons)
        )
    return notes


def correction(comparisons: Sequence[Comparison]) -> str:
    """Say what the p-values are corrected for."""
    return f"Holm-corrected over {len(comparisons)} comparison" + "s" * (len(comparisons) != 1)


def significance_marks(comparisons: Sequence[Comparison], test: Test, alpha: float) -> dict[tuple[str, str], str]:
    """Return (run, measure) → ▲, ▼ or nothing, for the comparisons with the first baseline."""
    return {
        (each.run, each.measure): _mark(each, test, alpha)
        for each in comparisons
        if each.baseline == comparisons[0].baseline
    }


def number(value: float | None, digits: int, *, signed: bool = False) -> str:
    """Format a value with a typographic minus; `–` for one that is not defined."""
    return "–" if value is None else f"{value:{'+' if signed else ''}.{digits}f}".replace("-", "−")


def rounded(value: float | None) -> str:
    """Format a value that is not negative with three significant digits, more before the point; `–` for None."""
    if value is None:
        return "–"
    decimals = 2 - math.floor(math.log10(value)) if value else 0
    return f"{value:,.{max(0, decimals)}f}"


def interval(bounds: tuple[float, float] | None, digits: int, *, signed: bool = False) -> str:
    """Format an interval; `–` for one that is not defined."""
    return "–" if bounds is None else " … ".join(number(bound, digits, signed=signed) for bound in bounds)


def p_value(p: float | None) -> str:
    """Format a p-value with three digits; `–` for one that is not defined."""
    return "–" if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"


def _mark(comparison: Comparison, test: Test, alpha: float) -> str:
    if not comparison.significant(test, alpha) or not comparison.difference:
        return ""
    return BETTER if comparison.difference > 0 else WORSE
