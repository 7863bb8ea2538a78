"""What `qpeft train` learns from: groups, dev candidates and a teacher, and a word on what is missing of them."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qpeft.atomic import is_stream
from qpeft.commands._run_provenance import read_run_provenance, scored_depth
from qpeft.data.candidates import candidates_from_run
from qpeft.data.collection import Collection
from qpeft.data.splits import unknown_split
from qpeft.data.trec import read_run
from qpeft.errors import InputError, OptionError
from qpeft.provenance import file_fingerprint
from qpeft.retrieval.bm25 import BM25
from qpeft.training.config import TrainingConfig
from qpeft.training.groups import MiningCounts, groups_from_collection, groups_from_jsonl, shuffled, unscored
from qpeft.training.processes import processes
from qpeft.types import Candidates, Group, Query, Run

if TYPE_CHECKING:
    from qpeft.commands.train import Config


_FILES = ("train_file", "run", "dev_run", "teacher")


def fingerprints(config: Config) -> dict[str, str]:
    """Return the SHA-256 of each file that the options name."""
    return {name: file_fingerprint(Path(path)) for name, path in _files(config)}


def _files(config: Config) -> Iterator[tuple[str, str]]:
    return ((name, path) for name in _FILES if (path := getattr(config, name)) is not None)


def say(text: str) -> None:
    """Print a line for the user, apart from any output; of processes that train together, one does."""
    if processes().first:
        print(text, file=sys.stderr)


def read_training_groups(
    config: Config, training: TrainingConfig, collection: Collection | None
) -> tuple[list[Group], MiningCounts]:
    """Return the groups to train on: of the collection, or of the file where one is given.

    Raises:
        OptionError: a pipe is given; files are read more than once, and a resumed training needs the same ones.
    """
    for name, path in _files(config):
        if is_stream(path):
            raise OptionError(f"--{name.replace('_', '-')} {path}: is a pipe; training reads files")
    if config.train_file is None:
        assert collection is not None
        assert config.split is not None
        assert config.negative_depth is not None
        return groups_from_collection(
            collection,
            config.split,
            negatives=training.negatives,
            seed=config.seed,
            queries=config.train_queries,
            run=read_run(config.run) if config.run else None,
            depth=config.negative_depth,
        )
    groups, counts = groups_from_jsonl(config.train_file)
    if config.train_queries is not None and config.train_queries < len(groups):
        groups = shuffled(sorted(groups, key=lambda group: group.query.id), config.seed)[: config.train_queries]
        without = sum(not group.negatives for group in groups)
        counts = dataclasses.replace(counts, queries=len(groups), without_negative=without)
    return groups, counts


def find_dev_candidates(config: Config, collection: Collection | None) -> list[Candidates]:
    """Return the dev queries with their candidates, those first of a seeded order that have a relevant one.

    Raises:
        InputError: there is none in `--dev-run`. Where BM25 finds none, this is said, and training does without dev.
    """
    if collection is None or config.dev_split is None:
        return []
    if config.dev_split not in collection.splits():
        error = unknown_split(collection.name, config.dev_split, collection.splits())
        raise OptionError(f"{error}; give --dev-split, or --dev-split null to train without dev")
    queries, qrels = collection.queries(config.dev_split), collection.qrels(config.dev_split)
    if config.dev_run:
        run = read_run(config.dev_run)
        runs = iter([Run((run[query_id] for query_id in shuffled(sorted(run), config.seed)), run.tag)])
    else:
        ordered = [queries[query_id] for query_id in shuffled(sorted(queries), config.seed)]
        runs = _retrieved(collection, ordered, config.dev_depth, 2 * config.dev_queries)
    usable = (
        item
        for run in runs
        for item in candidates_from_run(run, queries, collection.passages, config.dev_depth)
        if any(qrels[item.query.id].get(passage.id, 0) > 0 for passage in item.passages)
    )
    found = list(itertools.islice(usable, config.dev_queries))
    if not found:
        missing = f"no query of split {config.dev_split!r} has a relevant passage among its first {config.dev_depth}"
        if config.dev_run:
            raise InputError(f"{config.dev_run}: {missing}")
        say(f"  note: {missing} of BM25, so nothing is measured on dev, and the last state is kept")
    return found


def _retrieved(collection: Collection, queries: Sequence[Query], depth: int, at_once: int) -> Iterator[Run]:
    """Yield what BM25 finds for some queries after others, since the first may do."""
    index = BM25(collection.passages.values())
    for start in range(0, len(queries), at_once):
        yield Run(index.retrieve(queries[start : start + at_once], depth), "bm25")


def read_teacher(config: Config, groups: Sequence[Group]) -> Mapping[tuple[str, str], float] | None:
    """Return the teacher's scores by (query id, passage id), and say how many negatives have none.

    Raises:
        InputError: a positive has none; the lowest score, which stands for those that are missing, would teach that
            it is the worst passage.
        OptionError: it is a run whose candidates do not all have scores.
    """
    if config.teacher is None:
        return None
    depth = scored_depth(config.teacher, read_run_provenance(config.teacher))
    teacher = {
        (ranking.query_id, hit.passage_id): hit.score
        for ranking in read_run(config.teacher).values()
        for hit in ranking.hits[:depth]
    }
    positives, negatives = unscored(groups, teacher)
    if positives:
        query_id, passage_id = positives[0]
        without, asked = {query for query, _ in positives}, {group.query.id for group in groups}
        raise InputError(
            f"{config.teacher}: no score for positives of {len(without):,} of {len(asked):,} queries, first "
            f"query {query_id!r}, passage {passage_id!r}; score them too, or leave the queries out"
        )
    if negatives:
        say(f"  note: {len(negatives):,} negatives have no score of --teacher, and get its lowest")
    return teacher


def say_counts(counts: MiningCounts) -> None:
    """Say what was left out while groups were made."""
    notes = {
        "queries have no positive passage and were left out": counts.without_positive,
        "queries have no negatives of their own": counts.without_negative,
        "candidates hold an answer and were not taken as negatives": counts.dropped_as_answer,
        "negatives say the same as a positive and were dropped": counts.dropped_as_positive,
        "passages have no text and were dropped": counts.dropped_as_empty,
    }
    for what, count in notes.items():
        if count:
            say(f"  note: {count:,} {what}")
