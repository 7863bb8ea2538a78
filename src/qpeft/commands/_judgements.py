"""What `evaluate` and `compare` share: options, runs, what they cost, judgements."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qpeft.commands._run_provenance import read_run_provenance
from qpeft.data.collection import Collection, open_collection
from qpeft.data.trec import read_run
from qpeft.errors import FormatError, InputError, OptionError
from qpeft.evaluation.answers import has_answer, judge
from qpeft.evaluation.cost import Cost
from qpeft.evaluation.table_formats import Format
from qpeft.provenance import provenance_path
from qpeft.types import Qrels, Run

Labels = Literal["qrels", "answers"]


@dataclass(frozen=True)
class Judging:
    """Judgements."""

    collection: str
    """A BEIR folder, mini (embedded), or ir_datasets:ID."""
    split: str = "test"
    """Whose judgements."""
    measures: str = "nDCG@10 RR@10 R@10"
    """Separated by spaces; the first one is drawn in the report of compare."""
    labels: Labels = "qrels"
    """Judge by the collection's qrels, or by whether a passage contains an answer string (DPR's rule); of passages,
    those of all given runs are judged: recall and nDCG depend on all of them, RR, Success, CandR and CandHit do not."""


@dataclass(frozen=True)
class Shown:
    """Table."""

    format: Format = "text"
    """How it is printed."""
    digits: int = 4
    """Decimals."""
    cost: bool = False
    """Also show what the runs cost, where the provenance beside them says so; RPP is that of the first measure."""


def read_runs(paths: Sequence[str]) -> list[Run]:
    """Read runs; where two have the same tag, both are named after their files instead."""
    runs = [read_run(path) for path in paths]
    tags = [run.tag for run in runs]
    named = [Run(run.values(), path) if tags.count(run.tag) > 1 else run for run, path in zip(runs, paths, strict=True)]
    if len({run.tag for run in named}) < len(named):
        raise OptionError("the same run is given twice")
    return named


def read_costs(runs: Sequence[Run], paths: Sequence[str]) -> dict[str, Cost]:
    """Return the costs of the runs that have one in the provenance beside them, by tag.

    Raises:
        FormatError: a provenance file cannot be read.
    """
    costs = {}
    for run, path in zip(runs, paths, strict=True):
        facts = read_run_provenance(path) or {}
        if "cost" in facts:
            try:
                costs[run.tag] = Cost.from_dict(facts["cost"])
            except OptionError as error:
                raise FormatError(provenance_path(Path(path)), None, f"not the cost of a run: {error}") from error
    return costs


def judgements(collection: str, split: str, labels: Labels, runs: Sequence[Run]) -> tuple[Collection, Qrels]:
    """Return the collection and the judgements of a split, from its qrels or from its queries' answer strings.

    Raises:
        InputError: answers are asked for, and a query has none, or a passage of a run is not in the collection.
    """
    opened = open_collection(collection)
    if labels == "qrels":
        return opened, opened.qrels(split)
    queries, passages = opened.queries(split), opened.passages
    without = next((query.id for query in queries.values() if not query.answers), None)
    if without is not None:
        raise InputError(f"{collection}: query {without!r} has no answers; use --labels qrels")
    judged = [Run((ranking for query_id, ranking in run.items() if query_id in queries), run.tag) for run in runs]

    def label(query_id: str, passage_id: str) -> bool:
        passage = passages.get(passage_id)
        if passage is None:
            raise InputError(f"passage {passage_id!r}, ranked for query {query_id!r}, is not in {collection}")
        return has_answer(passage.text, queries[query_id].answers)

    found = judge(judged, label)
    return opened, {query_id: found.get(query_id, {}) for query_id in queries}
