"""Turn finished cells into the tables and figures of this recipe.

    python recipes/qpeft/table.py [--cells out/qpeft/cells] [--output recipes/qpeft/results]

A row's value is the mean over seeds of the means over queries; ± is the standard deviation over seeds. Tests are paired
t-tests over queries, on each query's mean over the seeds, against zero-shot and against the soft prompt (in the tables
of LoRA, of the authors' settings and of hard prompts: against Q-PEFT-A), Holm-corrected over all rows of a table and
both references.
"""

from __future__ import annotations

import argparse
import collections
import json
import statistics
from pathlib import Path
from typing import Any

from cells import GROUPS, Cell
from confirmation import MEASURES, Confirmation, p_value, shown
from figures import Rows, Zero, averaged, gains, parameters, sizes

from qpeft.evaluation.significance import holm

APART = {"lora": "LoRA", "authors": "Settings of the authors' code", "prompts": "Hard prompts"}
"""Groups with a table of their own, and its title."""


def read_cells(folder: Path) -> dict[tuple[str, int, str], Rows]:
    """Return (home, queries, group with a table of its own or nothing) → rows."""
    groups = {cell.name: group for group in APART for cell in GROUPS[group]()}
    found: dict[tuple[str, int, str], Rows] = collections.defaultdict(lambda: collections.defaultdict(list))
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        if result.get("test"):
            cell = Cell(**result["cell"])
            found[cell.home, cell.queries, groups.get(cell.name, "")][cell.row].append(result)
    return found


def table(
    rows: Rows, beside: Rows, baselines: dict[str, Any], collection: str, second: str
) -> tuple[list[list[str]], list[dict[str, Any]]]:
    """Return the lines of a collection's table, and every comparison.

    Args:
        rows: what is compared with the references.
        beside: rows that are only shown.
        baselines: of the first stage and the model alone.
        collection: where all was measured.
        second: a row, the second reference.
    """
    references = {"zero_shot": baselines["zero_shot"][collection]["per_query"]["RR@10"]}
    if second in rows or second in beside:
        references[second] = averaged((rows | beside)[second], collection, "RR@10")
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
    for name, cells in (beside | rows).items():
        values = []
        for measure in MEASURES:
            means = [statistics.fmean(c["test"][collection]["per_query"][measure].values()) for c in cells]
            spread = f" ± {statistics.stdev(means):.3f}" if len(means) > 1 else ""
            values.append(f"{statistics.fmean(means):.3f}{spread}")
        marks = []
        for reference in ("zero_shot", second):
            found = [c for c in comparisons if c["row"] == name and c["against"] == reference]
            marks.append("" if not found else f"{found[0]['difference']:+.3f} (p {shown(found[0]['p_holm'])})")
        seconds = statistics.fmean(c["training_seconds"] for c in cells)
        lines.append(
            [f"{name} ({len(cells)})", *values, *marks, f"{cells[0]['trained_parameters']:,}", f"{seconds:,.0f}"]
        )
    return lines, comparisons


def first_stages(path: Path) -> str:
    """Return what reranking wins over each first stage, as a Markdown table; Holm over all of its tests."""
    found = json.loads(path.read_text(encoding="utf-8"))
    lines, tests = [], []
    for collection, stages in found.items():
        for stage, systems in () if collection == "made" else stages.items():
            values = {name: system["per_query"]["RR@10"] for name, system in systems.items()}
            line = [collection, stage, f"{len(values['first_stage']):,}"]
            line += [f"{statistics.fmean(each.values()):.3f}" for each in values.values()]
            alone = values["zero_shot"]
            for own in (values["qpeft_a"], values["qpeft_r"]):
                tests.append(p_value(own, alone))
                difference = statistics.fmean(own[query] - value for query, value in alone.items())
                line.append(f"{difference:+.3f} (p {{}})")
            lines.append(line)
    corrected = iter(map(shown, holm(tests)))
    head = ["collection", "first stage", "queries", "RR@10 of it", "zero-shot", "qpeft_a", "qpeft_r"]
    head += ["qpeft_a − zero-shot", "qpeft_r − zero-shot"]
    rows = [[cell.format(next(corrected)) if "{}" in cell else cell for cell in line] for line in lines]
    return (
        "### The adapters that ship, over other first stages\n\n" + markdown([head, ["---"] * len(head), *rows]) + "\n"
    )


def headed(lines: list[list[str]], second: str) -> str:
    """Return the lines of `table` with their head."""
    head = [
        "row (seeds)",
        *MEASURES,
        "RR@10 − zero-shot",
        f"RR@10 − {second.replace('_', ' ')}",
        "trained parameters",
        "training seconds",
    ]
    return markdown([head, ["---"] * len(head), *lines])


def markdown(lines: list[list[str]]) -> str:
    """Return lines as a Markdown table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def reference(baselines: dict[str, Any], collection: str) -> Zero:
    """Return what the model alone reaches on a collection."""
    return Zero(collection, baselines["zero_shot"][collection]["per_query"])


def measured_on(rows: Rows, collection: str) -> Rows:
    """Return the rows with cells that were measured on a collection."""
    found = {name: [cell for cell in cells if collection in cell["test"]] for name, cells in rows.items()}
    return {name: cells for name, cells in found.items() if cells}


def main() -> None:
    """Write one table per home and collection, and all comparisons."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=Path, default=Path("out/qpeft/cells"))
    parser.add_argument("--output", type=Path, default=Path("recipes/qpeft/results"))
    args = parser.parse_args()
    baselines = json.loads((args.cells / "baselines.json").read_text(encoding="utf-8"))
    grouped = read_cells(args.cells)
    texts, everything = [], {}
    args.output.mkdir(parents=True, exist_ok=True)
    for (home, queries, group), rows in sorted(grouped.items()):
        second = "qpeft_a" if group else "soft_prompt"
        trained = grouped.get((home, queries, ""), {})
        references = {name: trained[name] for name in ("qpeft_a", "soft_prompt") if group and name in trained}
        for collection in baselines["bm25"]:
            measured, beside = measured_on(rows, collection), measured_on(references, collection)
            if not measured:
                continue
            lines, comparisons = table(measured, beside, baselines, collection, second)
            count = len(baselines["bm25"][collection]["per_query"]["RR@10"])
            title = f"{APART[group]}: trained" if group else "Trained"
            title += f" on {home.replace('+', ', ')}, {queries} queries; measured on {collection}, {count} test queries"
            texts.append(f"### {title}\n\n{headed(lines, second)}\n")
            if not group and len(measured) > 3:
                gains(measured, reference(baselines, collection), args.output / f"{home}-{queries}-{collection}.png")
            everything[f"{group} {home} {queries} → {collection}".strip()] = comparisons
    home, alone = "reddit-shift", reference(baselines, "reddit-shift")
    parameters({**grouped[home, 320, ""], **grouped[home, 320, "lora"]}, alone, args.output / "parameters.png")
    sizes({count: grouped[home, count, ""] for count in (80, 320, 1280)}, alone, args.output / "sizes.png")
    if (args.cells.parent / "confirm").is_dir():
        confirmation = Confirmation(args.cells.parent / "confirm")
        everything["confirmation"] = confirmation.tests()
        texts.insert(0, confirmation.markdown(everything["confirmation"]))
    if (stages := args.cells.parent / "first-stages.json").is_file():
        texts.append(first_stages(stages))
    (args.output / "tables.md").write_text("\n".join(texts), encoding="utf-8")
    (args.output / "comparisons.json").write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
