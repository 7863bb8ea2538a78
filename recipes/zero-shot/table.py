"""Collect the runs of `run` into one JSON file and one Markdown table; report each collection as a web page."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from qpeft.data.collection import open_collection
from qpeft.data.trec import read_run
from qpeft.evaluation.measures import evaluate
from qpeft.evaluation.significance import Comparison, compare, holm
from qpeft.provenance import provenance

DEV_CHOSEN = ("nq-mini", "wiki-shift", "reddit-shift", "squad")
MEASURES = "nDCG@10 RR@10 R@10"


def provenance_of(run: Path) -> dict[str, Any]:
    return json.loads(run.with_name(run.name + ".provenance.json").read_text(encoding="utf-8"))


def median_weight(output: Path) -> float:
    return statistics.median(provenance_of(output / f"{name}.test.mixed.trec")["weight"] for name in DEV_CHOSEN)


def marked(mean: float | None, p: float | None, difference: float | None) -> str:
    sign = "" if p is None or p > 0.05 or not difference else ("▲" if difference > 0 else "▼")
    return f"{mean:.3f}{sign}" if mean is not None else "–"


def main(data: Path, output: Path, results: Path) -> None:
    facts: dict[str, Any] = {}
    comparisons: list[tuple[str, Comparison]] = []
    for name in (*DEV_CHOSEN, "cacm"):
        collection = open_collection(str(data / name))
        qrels = collection.qrels("test")
        paths = {kind: output / f"{name}.test.{kind}.trec" for kind in ("bm25", "ql", "mixed")}
        evaluations = [evaluate(read_run(path), qrels, MEASURES) for path in paths.values()]
        ranked = provenance_of(paths["ql"])
        comparisons += [(name, each) for each in compare(evaluations[0], evaluations[1:])]
        facts[name] = {
            "queries": len(qrels),
            "weight": provenance_of(paths["mixed"])["weight"],
            "collection": ranked["collection"],
            "model": ranked["model"],
            "template": ranked["template"],
            "counts": ranked["counts"],
            "cost": ranked["cost"],
            "bm25": evaluations[0].means,
        }
    # One family of tests: every collection, both systems, every measure.
    corrected = holm([each.p_values["t"] for _, each in comparisons])
    lines = [
        "| collection | queries | system | nDCG@10 | RR@10 | R@10 | win/tie/loss (RR@10) |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, fact in facts.items():
        cells = " | ".join(f"{fact['bm25'][m]:.3f}" for m in MEASURES.split())
        lines.append(f"| {name} | {fact['queries']:,} | BM25 | {cells} | |")
        own = [(each, p) for (of, each), p in zip(comparisons, corrected, strict=True) if of == name]
        for run in dict.fromkeys(each.run for each, _ in own):
            by_measure = {each.measure: (each, p) for each, p in own if each.run == run}
            cells = " | ".join(marked(e.mean, p, e.difference) for e, p in (by_measure[m] for m in MEASURES.split()))
            rr, _ = by_measure["RR@10"]
            label = run if "+" not in run else f"{run}, weight {fact['weight']:g}"
            lines.append(f"| | | {label} | {cells} | {rr.wins}/{rr.ties}/{rr.losses} |")
            fact[run] = {
                e.measure: {"mean": e.mean, "interval": e.interval, "p": e.p_values, "holm_t": p}
                for e, p in by_measure.values()
            }
    results.mkdir(parents=True, exist_ok=True)
    (results / "results.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (results / "results.json").write_text(json.dumps(provenance(collections=facts), indent=2) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    if sys.argv[1] == "--median-weight":
        print(median_weight(Path(sys.argv[2])))
    else:
        main(*(Path(argument) for argument in sys.argv[1:4]))
