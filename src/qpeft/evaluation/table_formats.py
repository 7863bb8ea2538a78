"""Evaluations and comparisons in a format: text, Markdown, LaTeX (booktabs), CSV, JSON.

The first three are for reading and are rounded; CSV and JSON are for programs and carry full precision.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal, get_args

from qpeft.errors import OptionError, nearest
from qpeft.evaluation.cost import Cost
from qpeft.evaluation.measures import Evaluation
from qpeft.evaluation.significance import CONFIDENCE, Comparison, Test
from qpeft.evaluation.tables import BETTER, WORSE, Cell, Table, comparison_table, cost_table, measure_table

Format = Literal["text", "markdown", "latex", "csv", "json"]
MAX_DIGITS = 17
"""Decimals; a double has no more that count."""

_LATEX_MARKS = {BETTER: "$^{+}$", WORSE: "$^{-}$", "": ""}
_LATEX_ESCAPES = str.maketrans(
    {character: "\\" + character for character in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "|": r"\textbar{}"}
    | {"<": "$<$", ">": "$>$", "≤": r"$\leq$", "−": "$-$", "…": r"\ldots{}", "–": "--"}
    | {BETTER: _LATEX_MARKS[BETTER], WORSE: _LATEX_MARKS[WORSE]}
)


def render(
    evaluations: Sequence[Evaluation],
    comparisons: Sequence[Comparison] = (),
    *,
    format: Format = "text",
    test: Test = "t",
    alpha: float = 0.05,
    digits: int = 4,
    costs: Mapping[str, Cost] | None = None,
) -> str:
    """Return evaluations, comparisons if there are any, and costs by tag of the run if given, in one of the formats.

    Text, Markdown and LaTeX show the table of measures (`measure_table`), then that of the comparisons
    (`comparison_table`). CSV is one row per run, or, with comparisons, one row per comparison. JSON holds everything.

    Raises:
        OptionError: an unknown format, digits or an alpha out of range, or costs of runs in a CSV of comparisons.
    """
    if not 0 <= digits <= MAX_DIGITS:
        raise OptionError(f"digits is {digits}; it must be between 0 and {MAX_DIGITS}")
    if not 0 <= alpha <= 1:
        raise OptionError(f"alpha is {alpha}; it must be between 0 and 1")
    if format == "csv":
        if comparisons and costs is not None:
            raise OptionError(
                "CSV of comparisons has no place for costs: take the format json, or qpeft evaluate --cost"
            )
        return _comparisons_csv(comparisons) if comparisons else _evaluations_csv(evaluations, costs)
    if format == "json":
        return _json(evaluations, comparisons, test, alpha, costs)
    writers = {"text": text_table, "markdown": markdown_table, "latex": _latex}
    if format not in writers:
        raise OptionError(f"format {format!r} is not known{nearest(format, get_args(Format))}")
    tables = [measure_table(evaluations, comparisons, test=test, alpha=alpha, digits=digits)]
    if comparisons:
        tables.append(comparison_table(comparisons, test=test, alpha=alpha, digits=digits))
    if costs is not None:
        tables.append(cost_table(evaluations, costs))
    return "\n".join(writers[format](table) for table in tables)


def text_table(table: Table) -> str:
    """Return a table for the terminal."""
    # every number is followed by the place of its mark, and the name above it by a blank
    lines = [
        (*table.header[: table.names], *(name + " " for name in table.header[table.names :])),
        *(
            (
                *(cell.text for cell in row[: table.names]),
                *(cell.text + (cell.mark or " ") for cell in row[table.names :]),
            )
            for row in table.rows
        ),
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = [
        "  ".join(
            text.ljust(width) if column < table.names else text.rjust(width)
            for column, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    rule = "─" * max(map(len, aligned))
    return "\n".join([aligned[0], rule, *aligned[1:], *table.notes, ""])


def markdown_table(table: Table) -> str:
    """Return a table as Markdown."""

    def cell(entry: Cell) -> str:
        text = entry.text.replace("\\", "\\\\").replace("|", "\\|")
        return (f"**{text}**" if entry.best else text) + entry.mark

    lines = [
        "| " + " | ".join(table.header) + " |",
        "|" + "|".join("---" if column < table.names else "---:" for column in range(len(table.header))) + "|",
        *("| " + " | ".join(map(cell, row)) + " |" for row in table.rows),
    ]
    return "\n".join([*lines, "", *(f"{note}  " for note in table.notes), ""])


def _latex(table: Table) -> str:
    def cell(entry: Cell) -> str:
        text = entry.text.translate(_LATEX_ESCAPES)
        return (rf"\textbf{{{text}}}" if entry.best else text) + _LATEX_MARKS[entry.mark]

    columns = "l" * table.names + "r" * (len(table.header) - table.names)
    return "\n".join(
        [
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            " & ".join(name.translate(_LATEX_ESCAPES) for name in table.header) + r" \\",
            r"\midrule",
            *(" & ".join(map(cell, row)) + r" \\" for row in table.rows),
            r"\bottomrule",
            r"\end{tabular}",
            *(rf"\par\smallskip {note.translate(_LATEX_ESCAPES)}" for note in table.notes),
            "",
        ]
    )


def _costs(evaluation: Evaluation, costs: Mapping[str, Cost]) -> dict[str, Any]:
    """Return what is known of a run's cost, with the first measure's RPP."""
    cost = costs.get(evaluation.run)
    if cost is None:
        return {}
    mean = evaluation.mean_of_ranked(evaluation.measures[0])
    return {**cost.as_dict(), "quality_per_petaflop": cost.quality_per_petaflop(mean)}


def _evaluations_csv(evaluations: Sequence[Evaluation], costs: Mapping[str, Cost] | None) -> str:
    measures = tuple(dict.fromkeys(measure for each in evaluations for measure in each.measures))
    found = [_costs(each, costs or {}) for each in evaluations]
    known = tuple(dict.fromkeys(name for cost in found for name in cost))
    return _csv(
        [
            {"run": each.run, "queries": len(each.queries), "unranked": len(each.unranked)}
            | {measure: each.means.get(measure) for measure in measures}
            | {f"cost_{name}": cost.get(name) for name in known}
            for each, cost in zip(evaluations, found, strict=True)
        ]
    )


def _comparisons_csv(comparisons: Sequence[Comparison]) -> str:
    rows = []
    for each in comparisons:
        row: dict[str, Any] = asdict(each)
        row["interval_low"], row["interval_high"] = row.pop("interval") or (None, None)
        row["confidence"] = CONFIDENCE
        row |= {f"p_{test}": p for test, p in row.pop("p_values").items()}
        row |= {f"p_{test}_holm": p for test, p in row.pop("corrected").items()}
        rows.append(row)
    return _csv(rows)


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _json(
    evaluations: Sequence[Evaluation],
    comparisons: Sequence[Comparison],
    test: Test,
    alpha: float,
    costs: Mapping[str, Cost] | None,
) -> str:
    content: dict[str, Any] = {
        "runs": [
            {"run": each.run, "queries": len(each.queries), "unranked": len(each.unranked), "means": each.means}
            | ({} if costs is None else {"cost": _costs(each, costs) or None})
            for each in evaluations
        ]
    }
    if comparisons:
        content["comparisons"] = [
            {**asdict(each), "confidence": CONFIDENCE, "significant": each.significant(test, alpha)}
            for each in comparisons
        ]
        content["test"], content["alpha"] = test, alpha
    return json.dumps(content, ensure_ascii=False, indent=2) + "\n"
