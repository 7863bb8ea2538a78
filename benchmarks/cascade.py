"""Quality and work of cascades: nDCG@10 and RR@10 on dev queries against FLOPs per query, as JSON and as a picture.

    python benchmarks/cascade.py DATA

DATA holds BEIR folders. Every candidate is scored once by query likelihood and once by each cheap score; these are put
together to cascades with any number of survivors, by the code that ranks with them. FLOPs are those of the rows that
the cascade would have computed, without a passage cache; they must add up to what the model has counted. First, some
cascades are run as users run them, and must give the same rankings for the same FLOPs. Scores are kept in --work, so
that an interrupted run goes on. No time is measured.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure

from qpeft.analysis.plots import SERIES
from qpeft.data.candidates import candidates_from_run
from qpeft.data.collection import open_collection
from qpeft.evaluation.cost import Cost
from qpeft.evaluation.measures import evaluate
from qpeft.evaluation.significance import bootstrap_interval, per_query_differences
from qpeft.lm.flops import decoder_flops
from qpeft.loading import load_lm
from qpeft.methods import cascade
from qpeft.methods.query_likelihood import Config, QueryLikelihood, build_scorer
from qpeft.model_config import ModelConfig
from qpeft.pointwise import Pointwise
from qpeft.provenance import provenance
from qpeft.retrieval import bm25
from qpeft.types import Candidates, Passage, Query, Run, ScoringCounts

HERE = Path(__file__).parent
MEASURES = "nDCG@10 RR@10"
COLLECTIONS = ("reddit-shift", "squad")
SURVIVORS = (40, 30, 20, 15, 10)
INK = "#1c1e21"
KINDS = {
    "first_stage": "first stage's order",
    "passage_tokens": "first m tokens of the passage",
    "layers": "first L layers",
}
FULL = "full"
CHEAP = ("first_stage", *(f"passage_tokens={m}" for m in (8, 16, 32, 64)), *(f"layers={n}" for n in (1, 2, 3, 4, 5)))
CHECKED = (("50:10", "passage_tokens=16"), ("50:10", "layers=4"), ("50:30:10", "first_stage,layers=4"))


class Remembered:
    """A scorer's scores of all candidates, computed once, and the FLOPs that each pair takes.

    Args:
        scorer: what scores.
        lm: its model.
        items: all candidates.
        depth: layers that the scorer runs; None: all.
        path: where scores are kept; None: nowhere.
    """

    def __init__(
        self, scorer: QueryLikelihood, lm: Any, items: Sequence[Candidates], depth: int | None, path: Path | None
    ) -> None:
        self.counts, self.facts, self.spent = ScoringCounts(), scorer.facts, 0
        pairs = [(item.query, passage) for item in items for passage in item.passages]
        keys = [f"{query.id} {passage.id}" for query, passage in pairs]
        rows = scorer.prepare(pairs).rows
        if len(rows) != len(pairs):
            raise SystemExit("a passage without tokens: FLOPs cannot be told apart by pair")
        work = [
            decoder_flops(lm.shape, [(len(row) - 1, 0)], scored, depth, [scored] if depth is None else None)
            for row in rows
            for scored in [sum(row.scored)]
        ]
        self.flops = dict(zip(keys, work, strict=True))
        if path is not None and path.exists():
            self.scores = json.loads(path.read_text())
            return
        before = lm.computed.flops
        scores = [score for item in items for score in scorer.score([(item.query, p) for p in item.passages])]
        if lm.computed.flops - before != sum(work):
            raise SystemExit(f"{lm.computed.flops - before} FLOPs counted, {sum(work)} expected")
        self.scores = dict(zip(keys, scores, strict=True))
        if path is not None:
            temporary = path.with_suffix(".tmp")
            temporary.write_text(json.dumps(self.scores))
            temporary.replace(path)

    def check(self, query: Query) -> None:
        """All queries have been scored."""

    def score(self, pairs: Sequence[tuple[Query, Passage]]) -> list[float]:
        """Return the scores, and add up what they would have taken."""
        keys = [f"{query.id} {passage.id}" for query, passage in pairs]
        self.spent += sum(self.flops[key] for key in keys)
        return [self.scores[key] for key in keys]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--queries", type=int, default=150)
    parser.add_argument("--depth", type=int, default=50)
    parser.add_argument("--work", type=Path, default=Path("out/cascade"))
    parser.add_argument("--output", type=Path, default=HERE / "results" / "cascade.json")
    parser.add_argument("--picture", type=Path, default=HERE.parent / "docs" / "cascade.png")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    check(load_lm(ModelConfig(dtype="float32")), args)
    model = ModelConfig(dtype="bfloat16")
    lm: Any = load_lm(model)
    result: dict[str, Any] = {
        "settings": {"queries": args.queries, "depth": args.depth, "split": "dev", "first stage": "BM25", "seed": 0},
        "collections": {name: measure(lm, name, args) for name in COLLECTIONS},
        "made": provenance(model=lm.describe(), threads=torch.get_num_threads()),
    }
    args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    draw(result["collections"], args.picture)


def candidates(name: str, args: argparse.Namespace) -> tuple[Run, list[Candidates], Any, str]:
    """Return BM25's run for a sample of dev queries, its candidates, their judgements, the collection's fingerprint."""
    collection = open_collection(str(args.data / name))
    queries, qrels = collection.queries("dev"), collection.qrels("dev")
    chosen = random.Random(0).sample(sorted(qrels), args.queries)
    index = bm25.BM25(collection.passages.values())
    first = Run(index.retrieve([queries[query] for query in chosen], args.depth), "BM25")
    items = list(candidates_from_run(first, queries, collection.passages))
    return first, items, {query: qrels[query] for query in chosen}, collection.fingerprint()


def remember(lm: Any, items: Sequence[Candidates], label: str, path: Path | None) -> Remembered:
    """Score all candidates: in full, or as a cheap score's label says."""
    scorer, depth = build_scorer(Config(), lm), None
    if label != FULL:
        kind, _, number = label.partition("=")
        scorer = scorer.cheaper(**{kind: int(number)})
        depth = int(number) if kind == "layers" else None
    return Remembered(scorer, lm, items, depth, path)


def rank(
    scorers: Mapping[str, Remembered], items: Sequence[Candidates], sizes: Sequence[int], cheap: Sequence[str]
) -> tuple[Run, Cost]:
    """Return what a cascade makes of the scores, and its work; without cheap scores, the full ranking."""
    for scorer in scorers.values():
        scorer.spent = 0
    rankers = [None, *(None if label == "first_stage" else Pointwise(scorers[label]) for label in cheap)]
    steps = [cascade.Step(size, ranker) for size, ranker in zip(sizes, rankers, strict=True)]
    ranked = cascade.Cascade(steps, Pointwise(scorers[FULL]))
    run = Run(ranked.rerank(items), f"{':'.join(map(str, sizes))} {','.join(cheap)}".strip())
    spent = sum(scorer.spent for scorer in scorers.values())
    return run, Cost(1.0, len(items), ranked.counts.pairs, 0, flops=spent)  # a second stands for the time


def check(lm: Any, args: argparse.Namespace) -> None:
    """Run some cascades as users do, in float32, where the bits of a score hardly depend on its batch."""
    items = candidates(COLLECTIONS[0], args)[1][:3]
    for sizes, cheap in CHECKED:
        labels = [label for label in cheap.split(",") if label != "first_stage"]
        scorers = {label: remember(lm, items, label, None) for label in (FULL, *labels)}
        expected, cost = rank(scorers, items, [int(size) for size in sizes.split(":")], cheap.split(","))
        before = lm.computed.flops
        for ranking in cascade.build(cascade.Config(cascade=sizes, cheap=cheap), lm).rerank(items):
            own, other = ([hit.passage_id for hit in r.hits] for r in (ranking, expected[ranking.query_id]))
            if own != other:
                raise SystemExit(f"{sizes} {cheap}: query {ranking.query_id} is ranked otherwise when it is really run")
        if lm.computed.flops - before != cost.flops:
            raise SystemExit(
                f"{sizes} {cheap}: {lm.computed.flops - before} FLOPs when it is really run, not {cost.flops}"
            )
        print("checked", sizes, cheap, flush=True)


def measure(lm: Any, name: str, args: argparse.Namespace) -> dict[str, Any]:
    first, items, qrels, fingerprint = candidates(name, args)
    scorers = {}
    for label in (FULL, *CHEAP):
        if label != "first_stage":
            # Of other numbers there are other queries, and other candidates.
            kept = args.work / f"{name}.{args.queries}x{args.depth}.{label}.json"
            scorers[label] = remember(lm, items, label, kept)
            print(name, label, flush=True)
    whole, most = rank(scorers, items, [args.depth], [])
    reference = evaluate(whole, qrels, MEASURES)
    top = {query: {hit.passage_id for hit in ranking.hits[:10]} for query, ranking in whole.items()}
    settings = []
    for label in CHEAP:
        for survivors in SURVIVORS:
            run, cost = rank(scorers, items, [args.depth, survivors], [label])
            kept = [
                len(top[query] & {hit.passage_id for hit in ranking.hits[:survivors]}) / len(top[query])
                for query, ranking in run.items()
                if top[query]
            ]
            kind, _, number = label.partition("=")
            settings.append(
                {"cheap": kind, "number": int(number or 0), "survivors": survivors}
                | facts(run, cost, most, qrels, reference)
                | {"top ten kept": round(float(np.mean(kept)), 4)}
            )
    return {
        "queries": len(qrels),
        "candidates": sum(len(item.passages) for item in items),
        "fingerprint": fingerprint,
        "BM25": {measure: round(mean or 0.0, 4) for measure, mean in evaluate(first, qrels, MEASURES).means.items()},
        "full": facts(whole, most, most, qrels, None),
        "cascades": settings,
    }


def facts(run: Run, cost: Cost, most: Cost, qrels: Any, reference: Any) -> dict[str, Any]:
    found = evaluate(run, qrels, MEASURES)
    first = found.measures[0]
    described: dict[str, Any] = {
        "means": {measure: round(mean or 0.0, 4) for measure, mean in found.means.items()},
        "teraflops_per_query": round(cost.teraflops_per_query or 0.0, 5),
        "share of full": round((cost.flops or 0) / (most.flops or 1), 4),
        "QPP": round(cost.queries_per_petaflop or 0.0, 1),
        f"RPP {first}": round(cost.quality_per_petaflop(found.means[first]) or 0.0, 1),
    }
    if reference is not None:
        described["difference from full"] = {}
        for each in found.measures:
            differences = np.array(list(per_query_differences(reference, found, each).values()))
            interval = bootstrap_interval(differences)
            described["difference from full"][each] = {
                "mean": round(float(differences.mean()), 4),
                "interval": None if interval is None else [round(bound, 4) for bound in interval],
            }
    return described


def draw(collections: dict[str, Any], path: Path) -> None:
    """Draw quality, and what is left of the full ranking, over FLOPs: a line per cheap score, a point per survivors."""
    measure = MEASURES.split()[0]
    with matplotlib.rc_context({"font.size": 9.0, "axes.spines.right": False, "axes.spines.top": False}):
        figure = Figure(figsize=(9.2, 7.2), dpi=150, layout="constrained")
        panels = figure.subplots(2, len(collections), squeeze=False, sharex=True, sharey="row")
        for (quality, kept), (name, found) in zip(panels.T, collections.items(), strict=True):
            quality.axhline(found["full"]["means"][measure], color=INK, linewidth=0.9, label="all candidates in full")
            quality.axhline(found["BM25"][measure], color=INK, linewidth=0.9, linestyle=(0, (5, 2)), label="BM25")
            lines(quality, found["cascades"], lambda each: each["means"][measure])
            lines(kept, found["cascades"], lambda each: each["top ten kept"])
            quality.set(title=name, ylabel=f"dev {measure}")
            kept.set(
                xlabel="FLOPs per query, % of scoring all in full", ylabel="share of the full top ten that survives"
            )
            for axes in (quality, kept):
                axes.grid(axis="y", alpha=0.15, linewidth=0.8)
                axes.set_xlim(0, 110)
        handles, labels = panels[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=8)
        figure.savefig(path, metadata={"Software": None})


def lines(axes: Any, cascades: Sequence[dict[str, Any]], value: Callable[[dict[str, Any]], float]) -> None:
    for (kind, name), (colour, marker, _) in zip(KINDS.items(), SERIES, strict=False):
        numbers = sorted({each["number"] for each in cascades if each["cheap"] == kind})
        for place, number in enumerate(numbers, start=1):
            line = [each for each in cascades if each["cheap"] == kind and each["number"] == number]
            points = [100 * each["share of full"] for each in line], [value(each) for each in line]
            label = name if place == len(numbers) else None
            strength = 0.35 + 0.65 * place / len(numbers)
            axes.plot(*points, color=colour, marker=marker, markersize=3.5, linewidth=1.1, alpha=strength, label=label)
            if number and points[0][-1] < 105:
                end = points[0][-1], points[1][-1]
                axes.annotate(str(number), end, (-3, -9), textcoords="offset points", color=colour, fontsize=7)


if __name__ == "__main__":
    main()
