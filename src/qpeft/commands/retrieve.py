"""Find candidates for the queries of a split with BM25 or dense retrieval."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qpeft.commands._output import check_output
from qpeft.commands._peek import peek
from qpeft.commands._progress import progress_bar
from qpeft.data.collection import Collection, identity, open_collection
from qpeft.data.trec import check_ids, write_run
from qpeft.errors import OptionError, at_least, nearest
from qpeft.provenance import provenance, write_provenance
from qpeft.retrieval import bm25, dense
from qpeft.retrieval._index_folder import is_index_of
from qpeft.types import Ranking, Run

FIRST_STAGES: dict[str, tuple[type[Any], type[Any]]] = {
    "bm25": (bm25.Config, bm25.BM25),
    "dense": (dense.Config, dense.Dense),
}
"""Options and index of each."""


@dataclass(frozen=True)
class Config:
    """Retrieval."""

    collection: str
    """A BEIR folder, mini (embedded), or ir_datasets:ID."""
    output: str
    """The run file to write (.gz packs it)."""
    split: str = "test"
    """Whose queries."""
    first_stage: str = "bm25"
    """bm25 or dense."""
    depth: int = 100
    """Passages per query."""
    index: str | None = None
    """Folder to keep the index in, and to find it again."""


def configs(arguments: Sequence[str]) -> tuple[type[Any], ...]:
    """Return this command's options and those of the first stage."""
    name = peek(arguments, "first-stage", Config.first_stage)
    if name not in FIRST_STAGES:
        raise OptionError(f"unknown first stage {name!r}{nearest(name, FIRST_STAGES)}")
    return Config, FIRST_STAGES[name][0]


def run(config: Config, stage: Any) -> None:
    """Retrieve and write the run with its provenance."""
    check_output(config.output)
    at_least(1, depth=config.depth)
    collection = open_collection(config.collection)
    queries = list(collection.queries(config.split).values())
    searched = identity(collection, config.split)
    index = _index(config, stage, collection, searched["fingerprint"])
    started = time.perf_counter()
    rankings: list[Ranking] = []
    with progress_bar(config.first_stage, len(queries)) as bar:
        for ranking in index.retrieve(queries, config.depth):
            check_ids(ranking)
            rankings.append(ranking)
            bar.advance()
    output = Path(config.output)
    write_run(Run(rankings, config.first_stage), output)
    facts = {
        "command": "retrieve",
        "options": dataclasses.asdict(config) | dataclasses.asdict(stage),
        "collection": searched,
        "queries": len(rankings),
        "seconds": round(time.perf_counter() - started, 3),
    }
    write_provenance(output, provenance(**facts))
    empty = sum(not ranking.hits for ranking in rankings)
    note = f"; {empty} queries share no word with any passage" if empty else ""
    print(f"{output}: {len(rankings)} queries{note}", file=sys.stderr)


def _index(config: Config, stage: Any, collection: Collection, fingerprint: str) -> Any:
    _, kind = FIRST_STAGES[config.first_stage]
    made_from = {"first_stage": config.first_stage, "collection": fingerprint, "written": collection.written()}
    made_from |= stage.made_of()
    folder = Path(config.index) if config.index else None
    if folder is not None and is_index_of(folder, made_from):
        return kind.load(folder)
    index = kind(collection.passages.values(), stage, progress=sys.stderr.isatty())
    if folder is not None:
        index.save(folder, made_from)
    return index
