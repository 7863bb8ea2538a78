"""Rows of the tables: means, what is compared with what, what it cost, and what dev said of settings."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from confirmation import MEASURES, p_value, shown
from figures import Rows, averaged

from qpeft.evaluation.significance import holm

Comparisons = list[dict[str, Any]]
HALF = "half BM25"


def quality(
    rows: Rows, beside: Rows, baselines: dict[str, Any], collection: str, second: str
) -> tuple[str, Comparisons]:
    """Return a collection's table, and every comparison.

    Args:
        rows: what is compared with the references.
        beside: rows that are only shown.
        baselines: of the first stage and the model alone.
        collection: where all was measured.
        second: a row, the second reference beside the model alone.
    """
    comparisons = compared(rows, beside, baselines["zero_shot"][collection], collection, second)
    gains = mixed_gains(rows, baselines["zero_shot"][collection], collection)
    head = ["row (seeds)", *MEASURES, f"RR@10, {HALF}", "RR@10 − zero-shot", f"RR@10 − {second.replace('_', ' ')}"]
    lines = []
    for name, kind in (("bm25", "per_query"), ("zero_shot", "per_query"), ("zero_shot", "mixed")):
        found = baselines[name][collection]
        mixed = spread([found], "mixed", "RR@10") if kind == "per_query" else ""
        values = [spread([found], kind, measure) for measure in MEASURES]
        lines.append([name if kind == "per_query" else f"{name}, {HALF}", *values, mixed, "", ""])
    for name, cells in (beside | rows).items():
        tests = [cell["test"][collection] for cell in cells]
        values = [spread(tests, "per_query", measure) for measure in MEASURES]
        marks = [comparison_of(comparisons, name, reference) for reference in ("zero_shot", second)]
        mixed = spread(tests, "mixed", "RR@10") + gains.get(name, "")
        lines.append([f"{name} ({len(cells)})", *values, mixed, *marks])
    return markdown(head, lines), comparisons


def mixed_gains(rows: Rows, alone: dict[str, Any], collection: str) -> dict[str, str]:
    """Return what rows gain on the model alone where both are mixed with BM25, Holm-corrected over the rows.

    Nothing of rows that were not mixed.
    """
    found: dict[str, tuple[float, float]] = {}
    base = alone.get("mixed", {}).get("RR@10", {})
    for name, cells in rows.items():
        if base and all("mixed" in cell["test"][collection] for cell in cells):
            own = averaged(cells, collection, "RR@10", "mixed")
            found[name] = statistics.fmean(own[query] - base[query] for query in base), p_value(own, base)
    corrected = holm([p for _, p in found.values()])
    return {
        name: f" ({difference:+.3f}, p {shown(p)})"
        for (name, (difference, _)), p in zip(found.items(), corrected, strict=True)
    }


def against_soft_prompt(rows: Rows, soft_prompt: list[dict[str, Any]], collection: str) -> str:
    """Return a line with what trained rows of another table than its own gain on it, Holm-corrected over them."""
    static = averaged(soft_prompt, collection, "RR@10")
    found = {
        name: averaged(cells, collection, "RR@10") for name, cells in rows.items() if cells[0]["trained_parameters"]
    }
    ps = holm([p_value(own, static) for own in found.values()])
    gains = [statistics.fmean(own[query] - static[query] for query in static) for own in found.values()]
    listed = [f"{name} {gain:+.3f} (p {shown(p)})" for name, gain, p in zip(found, gains, ps, strict=True)]
    return f"\nRR@10 − soft prompt: {' · '.join(listed)}\n" if listed else ""


def compared(rows: Rows, beside: Rows, alone: dict[str, Any], collection: str, second: str) -> Comparisons:
    """Return the difference in RR@10 of each row from both references, Holm-corrected over all of them."""
    references = {"zero_shot": alone["per_query"]["RR@10"]}
    if second in rows or second in beside:
        references[second] = averaged((rows | beside)[second], collection, "RR@10")
    found: Comparisons = []
    for name, cells in rows.items():
        own = averaged(cells, collection, "RR@10")
        for reference, values in references.items():
            if name != reference:
                difference = statistics.fmean(own[q] - values[q] for q in values)
                found.append({"row": name, "against": reference, "difference": difference, "p": p_value(own, values)})
    for comparison, corrected in zip(found, holm([c["p"] for c in found]), strict=True):
        comparison["p_holm"] = corrected
    return found


def comparison_of(comparisons: Comparisons, row: str, reference: str) -> str:
    """Return one comparison as it is printed, if it was made."""
    for found in comparisons:
        if (found["row"], found["against"]) == (row, reference):
            return f"{found['difference']:+.3f} (p {shown(found['p_holm'])})"
    return ""


def spread(tests: list[dict[str, Any]], kind: str, measure: str) -> str:
    """Return the mean over seeds of the means over queries, and the standard deviation over seeds.

    Nothing where it was not measured: early results were not mixed.
    """
    if any(kind not in test for test in tests):
        return ""
    means = [statistics.fmean(test[kind][measure].values()) for test in tests]
    deviation = f" ± {statistics.stdev(means):.3f}" if len(means) > 1 else ""
    return f"{statistics.fmean(means):.3f}{deviation}"


def costs(rows: Rows, alone: dict[str, Any], home: str) -> str:
    """Return what rows train, how long that took, and how many passages a second they ranked at home."""
    lines = [["zero_shot", "0", "", f"{alone['passages/s']:,.0f}"]] if "passages/s" in alone else []
    for name, cells in rows.items():
        seconds = statistics.fmean(cell["training_seconds"] for cell in cells)
        speeds = [cell["test"][home]["passages/s"] for cell in cells if "passages/s" in cell["test"][home]]
        speed = f"{statistics.fmean(speeds):,.0f}" if speeds else ""
        lines.append([f"{name} ({len(cells)})", f"{cells[0]['trained_parameters']:,}", f"{seconds:,.0f}", speed])
    return markdown(["row (seeds)", "trained parameters", "training seconds", "passages/s"], lines)


def dev(cells: Iterable[dict[str, Any]], beside: dict[str, float]) -> str:
    """Return RR@10 on dev after evaluations that all rows have, the mean of all seeds, below what was not trained."""
    curves: dict[str, list[dict[int, float]]] = {}
    for cell in cells:
        curves.setdefault(cell["cell"]["row"], []).append(evaluations(cell))
    steps = sorted(set[int].intersection(*(set(curve) for own in curves.values() for curve in own)))
    lines = [[name, f"{value:.3f}", *[""] * len(steps)] for name, value in beside.items()]
    for row, own in sorted(curves.items()):
        means = [f"{statistics.fmean(curve[step] for curve in own):.3f}" for step in steps]
        lines.append([f"{row} ({len(own)})", "", *means])
    return markdown(["setting (seeds)", "untrained", *(f"after {step} steps" for step in steps)], lines)


def evaluations(cell: dict[str, Any]) -> dict[int, float]:
    """Return step → RR@10 on dev."""
    return {int(entry["step"]): entry["eval_RR@10"] for entry in cell["history"] if "eval_RR@10" in entry}


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
    return markdown(head, [[cell.format(next(corrected)) if "{}" in cell else cell for cell in line] for line in lines])


def choice(path: Path) -> str:
    """Return what ships and what may, on dev of each collection, and the differences from the model alone."""
    found: dict[str, dict[str, dict[str, float]]] = json.loads(path.read_text(encoding="utf-8"))
    found.pop("made", None)
    alone, lines = found["zero_shot"], []
    for name, homes in found.items():
        line = [name]
        for home, values in homes.items():
            mean = f"{statistics.fmean(values.values()):.3f}"
            difference = statistics.fmean(value - alone[home][query] for query, value in values.items())
            line.append(mean if name == "zero_shot" else f"{mean} ({difference:+.3f})")
        lines.append(line)
    return markdown(["adapter", *(f"{home} ({len(values)})" for home, values in alone.items())], lines)


def markdown(head: list[str], lines: list[list[str]]) -> str:
    """Return lines as a Markdown table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *lines)) + "\n"
