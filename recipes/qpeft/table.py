"""Turn finished cells into the tables and figures of this recipe.

    python recipes/qpeft/table.py [--cells out/qpeft/cells] [--output recipes/qpeft/results]

A row's value is the mean over seeds of the means over queries; ± is the standard deviation over seeds. Tests are paired
t-tests over queries, on each query's mean over the seeds, against zero-shot and against the soft prompt, Holm-corrected
over all rows of a collection and both baselines.
"""

from __future__ import annotations

import argparse
import collections
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from confirmation import BASELINES, MEASURES, Confirmation, p_value, shown
from matplotlib.figure import Figure

from qpeft.evaluation.significance import bootstrap_interval, holm


def read_cells(folder: Path) -> dict[tuple[str, int, str], list[dict[str, Any]]]:
    """Return (home, queries, row) → cells, one per seed."""
    found: dict[tuple[str, int, str], list[dict[str, Any]]] = collections.defaultdict(list)
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        if result.get("test"):
            cell = result["cell"]
            found[cell["home"], cell["queries"], cell["row"]].append(result)
    return found


def averaged(cells: list[dict[str, Any]], collection: str, measure: str) -> dict[str, float]:
    """Return query id → the measure's mean over seeds."""
    values = [cell["test"][collection]["per_query"][measure] for cell in cells]
    return {query: statistics.fmean(v[query] for v in values) for query in values[0]}


def table(
    rows: dict[str, list[dict[str, Any]]], baselines: dict[str, Any], collection: str
) -> tuple[list[list[str]], list[dict[str, Any]]]:
    """Return the lines of a collection's table, and every comparison."""
    references = {"zero_shot": baselines["zero_shot"][collection]["per_query"]["RR@10"]}
    if "soft_prompt" in rows:
        references["soft_prompt"] = averaged(rows["soft_prompt"], collection, "RR@10")
    comparisons = []
    for name, cells in rows.items():
        own = averaged(cells, collection, "RR@10")
        for reference, values in references.items():
            if name != reference:
                difference = statistics.fmean(own[q] - values[q] for q in values)
                comparisons.append(
                    {"row": name, "against": reference, "difference": difference, "p": p_value(own, values)}
                )
    for comparison, corrected in zip(comparisons, holm([c["p"] for c in comparisons]), strict=True):
        comparison["p_holm"] = corrected
    lines = []
    for name in ("bm25", "zero_shot"):
        per_query = baselines[name][collection]["per_query"]
        values = [f"{statistics.fmean(per_query[m].values()):.3f}" for m in MEASURES]
        lines.append([name, *values, "", "", "", ""])
    for name, cells in rows.items():
        values = []
        for measure in MEASURES:
            means = [statistics.fmean(c["test"][collection]["per_query"][measure].values()) for c in cells]
            spread = f" ± {statistics.stdev(means):.3f}" if len(means) > 1 else ""
            values.append(f"{statistics.fmean(means):.3f}{spread}")
        marks = []
        for reference in BASELINES:
            found = [c for c in comparisons if c["row"] == name and c["against"] == reference]
            marks.append("" if not found else f"{found[0]['difference']:+.3f} (p {shown(found[0]['p_holm'])})")
        seconds = statistics.fmean(c["training_seconds"] for c in cells)
        lines.append(
            [f"{name} ({len(cells)})", *values, *marks, f"{cells[0]['trained_parameters']:,}", f"{seconds:,.0f}"]
        )
    return lines, comparisons


def figure(rows: dict[str, list[dict[str, Any]]], baselines: dict[str, Any], collection: str, path: Path) -> None:
    """Draw each row's RR@10 against zero-shot: a dot per seed, the mean with a 95 % bootstrap interval over queries."""
    reference = baselines["zero_shot"][collection]["per_query"]["RR@10"]
    ordered = sorted(rows, key=lambda name: statistics.fmean(averaged(rows[name], collection, "RR@10").values()))
    drawing = Figure(figsize=(7, 0.45 * len(rows) + 1.2), layout="constrained")
    axes = drawing.add_subplot()
    for place, name in enumerate(ordered):
        own = averaged(rows[name], collection, "RR@10")
        low, high = bootstrap_interval(np.array([own[q] - reference[q] for q in reference])) or (0.0, 0.0)
        axes.plot([low, high], [place, place], color="#0072B2", linewidth=2)
        axes.plot(statistics.fmean(own[q] - reference[q] for q in reference), place, "o", color="#0072B2", markersize=8)
        for cell in rows[name]:
            values = cell["test"][collection]["per_query"]["RR@10"]
            difference = statistics.fmean(values[q] - reference[q] for q in reference)
            axes.plot(difference, place + 0.18, "o", color="#D55E00", markersize=3)
    axes.axvline(0, color="grey", linewidth=1)
    axes.set_yticks(range(len(ordered)), ordered)
    axes.set_xlabel(f"RR@10 on {collection} minus zero-shot; line: 95 % over queries, small dots: seeds")
    axes.spines[["top", "right"]].set_visible(False)
    drawing.savefig(path, dpi=130)


def markdown(lines: list[list[str]]) -> str:
    """Return lines as a Markdown table."""
    head = [
        "row (seeds)",
        *MEASURES,
        "RR@10 − zero-shot",
        "RR@10 − soft prompt",
        "trained parameters",
        "training seconds",
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *lines])


def main() -> None:
    """Write one table per home and collection, and all comparisons."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=Path, default=Path("out/qpeft/cells"))
    parser.add_argument("--output", type=Path, default=Path("recipes/qpeft/results"))
    args = parser.parse_args()
    baselines = json.loads((args.cells / "baselines.json").read_text(encoding="utf-8"))
    grouped: dict[tuple[str, int], dict[str, list[dict[str, Any]]]] = collections.defaultdict(dict)
    for (home, queries, row), cells in read_cells(args.cells).items():
        grouped[home, queries][row] = cells
    texts, everything = [], {}
    args.output.mkdir(parents=True, exist_ok=True)
    for (home, queries), rows in sorted(grouped.items()):
        for collection in baselines["bm25"]:
            measured = {name: [c for c in cells if collection in c["test"]] for name, cells in rows.items()}
            measured = {name: cells for name, cells in measured.items() if cells}
            if not measured:
                continue
            lines, comparisons = table(measured, baselines, collection)
            count = len(baselines["bm25"][collection]["per_query"]["RR@10"])
            homes = home.replace("+", ", ")
            title = f"### Trained on {homes}, {queries} queries; measured on {collection}, {count} test queries"
            texts.append(f"{title}\n\n{markdown(lines)}\n")
            if len(measured) > 3:
                figure(measured, baselines, collection, args.output / f"{home}-{queries}-{collection}.png")
            everything[f"{home} {queries} → {collection}"] = comparisons
    if (args.cells.parent / "confirm").is_dir():
        confirmation = Confirmation(args.cells.parent / "confirm")
        everything["confirmation"] = confirmation.tests()
        texts.insert(0, confirmation.markdown(everything["confirmation"]))
    (args.output / "tables.md").write_text("\n".join(texts), encoding="utf-8")
    (args.output / "comparisons.json").write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
