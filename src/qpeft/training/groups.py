"""Where training groups come from: judged collections with mined negatives, or files that bring their own.

All choices are seeded, and depend on ids alone, never on the order of files or mappings. The negatives of a query do
not depend on which other queries are trained on.
"""

from __future__ import annotations

import codecs
import collections
import itertools
import random
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from qpeft.data.candidates import candidates_from_run
from qpeft.data.collection import Collection
from qpeft.data.dpr import read_dpr_training
from qpeft.data.files import StrPath, numbered_lines, open_binary
from qpeft.data.jsonl import read_groups
from qpeft.errors import FormatError, InputError, OptionError, QueryError, at_least
from qpeft.evaluation.answers import has_answer
from qpeft.retrieval.bm25 import BM25
from qpeft.types import Group, Passage, Qrels, Query, Ranking, Run

_Item = TypeVar("_Item")


@dataclass(frozen=True, slots=True)
class MiningCounts:
    """What was met while groups were made.

    Attributes:
        queries: groups made.
        without_positive: queries left out because no passage of the collection answers them.
        without_negative: groups that have no negative of their own.
        dropped_as_answer: candidates passed over as negatives because they hold an answer.
        dropped_as_positive: … because they say the same as a positive, without being judged; in a file, also because
            they have its id.
        dropped_as_empty: passages without any text.
    """

    queries: int = 0
    without_positive: int = 0
    without_negative: int = 0
    dropped_as_answer: int = 0
    dropped_as_positive: int = 0
    dropped_as_empty: int = 0


def groups_from_collection(
    collection: Collection,
    split: str,
    *,
    negatives: int,
    seed: int,
    queries: int | None = None,
    run: Run | None = None,
    depth: int = 100,
    pool: int = 20,
) -> tuple[list[Group], MiningCounts]:
    """Make a group of every judged query that has a relevant passage, in a seeded order.

    Positives are the passages with a grade of 1 or more, highest grade first, then by id. Candidates for negatives are
    the top of a ranking; they are looked at in a seeded order until enough are found, and one is passed over if it is
    judged relevant, says the same as a positive, holds one of the query's answers (DPR's rule), or has no text.

    Args:
        collection: passages, queries, judgements.
        split: whose queries.
        negatives: how many are to be drawn at a time; 0 mines none.
        seed: of the sample of queries and the choice of negatives.
        queries: how many to sample, of those with a positive; a smaller sample is the beginning of a larger one.
        run: the ranking to take negatives from; BM25 on the collection if there is none.
        depth: how far down the ranking.
        pool: negatives to keep for a group, so that `draw` finds others in each epoch; at least `negatives` are.

    Raises:
        OptionError: a number out of range, or no such split.
        QueryError: a query is empty.
        UnknownIdError: a passage of the run is not in the collection.
        InputError: no query of the split has a relevant passage.
    """
    at_least(0, negatives=negatives)
    at_least(1, depth=depth, pool=pool, queries=queries)
    known, qrels, tally = collection.queries(split), collection.qrels(split), _Tally()
    positives = _positives(shuffled(sorted(known), f"queries {seed}"), qrels, collection.passages, queries, tally)
    if not positives:
        raise InputError(f"{collection.name}: no query of split {split!r} has a relevant passage")
    chosen = [known[query_id] for query_id in positives]
    for query in chosen:
        if not query.text.strip():
            raise QueryError(f"query {query.id!r} is empty")
    wanted = max(negatives, pool) if negatives else 0
    rankings = _ranked(collection, chosen, run if wanted else Run((), "none"), depth)
    groups = []
    for query, ranked in zip(chosen, rankings, strict=True):
        candidates = [passage for passage in ranked if qrels[query.id].get(passage.id, 0) < 1]
        candidates = shuffled(candidates, f"pool {seed} {query.id}")
        found = positives[query.id]
        groups.append(Group(query, found, tally.usable(candidates, found, query.answers, wanted)))
    return groups, tally.counts(groups)


def groups_from_jsonl(path: StrPath) -> tuple[list[Group], MiningCounts]:
    """Read groups from a file: JSON Lines as of FlagEmbedding or Tevatron (`read_groups`), or DPR's JSON list.

    Negatives are those of the file, whole and in its order, without those that are or say the same as a positive of
    the query, on whichever line.
    Whether they hold an answer is not looked at. Questions of a DPR file without `positive_ctxs` are left out by its
    reader and not counted.

    Raises:
        InputError: the file cannot be opened.
        FormatError: the file is malformed, a line has an empty query or no positive with a text, or the file has no
            group.
    """
    groups = read_dpr_training(path) if _is_list(path) else read_groups(path)
    tally = _Tally()
    relevant: dict[str, tuple[Passage, ...]] = collections.defaultdict(tuple)
    for group in groups:
        relevant[group.query.text] += group.positives
    for i, group in enumerate(groups):
        if not group.query.text.strip():
            raise _malformed(path, i, group, "the query is empty")
        positives = tally.with_text(group.positives)
        if not positives:
            raise _malformed(path, i, group, "no positive has a text")
        of_query = relevant[group.query.text]
        negatives = tally.usable(group.negatives, of_query, (), None)
        also = tuple(passage for passage in of_query if passage not in group.positives)
        groups[i] = Group(group.query, positives, negatives, also)
    if not groups:
        raise FormatError(path, None, "no group with a positive")
    return groups, tally.counts(groups)


def draw(group: Group, negatives: int, epoch: int, seed: int) -> tuple[Passage, ...]:
    """Return the passages of a group for one epoch: one of its positives, then up to `negatives` of its negatives.

    A function of seed, epoch and query id alone, so that a resumed training sees what an uninterrupted one would have.

    Raises:
        OptionError: a negative number of negatives.
    """
    at_least(0, negatives=negatives)
    count = min(negatives, len(group.negatives))
    drawn = random.Random(f"draw {seed} {epoch} {group.query.id}").sample(group.negatives, count)
    positive = random.Random(f"positive {seed} {epoch} {group.query.id}").choice(group.positives)
    return (positive, *drawn)


def of_other_queries(group: Group, groups: Iterable[Group], drawn: Iterable[Sequence[Passage]]) -> Iterator[Passage]:
    """Yield what was drawn for the groups of a batch that ask something else: a query may have several groups."""
    for other, passages in zip(groups, drawn, strict=True):
        if other.query.id != group.query.id and other.query.text != group.query.text:
            yield from passages


def in_batch_negatives(group: Group, drawn: Sequence[Passage], others: Iterable[Passage]) -> tuple[Passage, ...]:
    """Return which passages of other queries may stand as negatives beside those drawn for a group, each once.

    One is passed over if it is or says the same as a positive of the query, in whichever group, or what was drawn for
    this one, or holds one of the query's answers.
    """
    ids, contents = {passage.id for passage in drawn}, {_content(passage) for passage in drawn}
    found = []
    for passage in _Tally().usable(others, group.positives + group.also_relevant, group.query.answers, None):
        if passage.id not in ids and _content(passage) not in contents:
            found.append(passage)
            ids.add(passage.id)
            contents.add(_content(passage))
    return tuple(found)


def unscored(
    groups: Iterable[Group], teacher: Container[tuple[str, str]]
) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Return the (query id, passage id) that a teacher has no score for: of positives, of negatives."""
    positives, negatives = [], []
    for group in groups:
        positives += [(group.query.id, passage.id) for passage in group.positives]
        negatives += [(group.query.id, passage.id) for passage in group.negatives]
    return [pair for pair in positives if pair not in teacher], [pair for pair in negatives if pair not in teacher]


def next_queries(queries: Sequence[Query]) -> dict[str, Query]:
    """Return for each query id another query of the list: the next, and for the last the first.

    Raises:
        OptionError: there is no other query.
    """
    distinct = list({query.id: query for query in queries}.values())
    if len(distinct) == 1:
        raise OptionError("--hint-queries shuffled needs two queries, in training and on dev")
    return {query.id: other for query, other in zip(distinct, distinct[1:] + distinct[:1], strict=True)}


class _Tally:
    """Sorts out passages, and counts what it sorts out."""

    def __init__(self) -> None:
        self.without_positive = 0
        self._as_answer = 0
        self._as_positive = 0
        self._as_empty = 0

    def with_text(self, passages: Iterable[Passage]) -> tuple[Passage, ...]:
        """Return the passages that have any text."""
        return tuple(passage for passage in passages if not self._is_empty(passage))

    def usable(
        self, candidates: Iterable[Passage], positives: tuple[Passage, ...], answers: tuple[str, ...], most: int | None
    ) -> tuple[Passage, ...]:
        """Return the first candidates that may stand as negatives; all of them if `most` is None."""
        ids = {passage.id for passage in positives}
        contents = {_content(passage) for passage in positives}
        found: list[Passage] = []
        for passage in candidates:
            if len(found) == most:
                break
            if self._is_empty(passage):
                continue
            if passage.id in ids or _content(passage) in contents:
                self._as_positive += 1
            elif answers and has_answer(passage.text, answers):
                self._as_answer += 1
            else:
                found.append(passage)
        return tuple(found)

    def counts(self, groups: list[Group]) -> MiningCounts:
        """Return the counts, with those of the finished groups."""
        return MiningCounts(
            queries=len(groups),
            without_positive=self.without_positive,
            without_negative=sum(not group.negatives for group in groups),
            dropped_as_answer=self._as_answer,
            dropped_as_positive=self._as_positive,
            dropped_as_empty=self._as_empty,
        )

    def _is_empty(self, passage: Passage) -> bool:
        self._as_empty += passage.blank
        return passage.blank


def _content(passage: Passage) -> str:
    """Return what is compared: the text with white space folded, or the title of a passage that has no more."""
    return " ".join(passage.text.split()) or " ".join(passage.title.split())


def _positives(
    query_ids: Iterable[str], qrels: Qrels, passages: Mapping[str, Passage], most: int | None, tally: _Tally
) -> dict[str, tuple[Passage, ...]]:
    """Return the positives of the first queries that have any, best first."""
    chosen: dict[str, tuple[Passage, ...]] = {}
    for query_id in query_ids:
        if len(chosen) == most:
            break
        relevant = sorted((-grade, passage_id) for passage_id, grade in qrels[query_id].items() if grade >= 1)
        # Published judgements name passages that their corpus does not have.
        found = tally.with_text(passage for _, id in relevant if (passage := passages.get(id)) is not None)
        if found:
            chosen[query_id] = found
        else:
            tally.without_positive += 1
    return chosen


def _ranked(collection: Collection, queries: list[Query], run: Run | None, depth: int) -> Iterator[tuple[Passage, ...]]:
    """Yield the top of each query's ranking; nothing for a query that the run does not have."""
    rankings: Iterable[Ranking]
    if run is None:
        tag, rankings = "bm25", BM25(collection.passages.values()).retrieve(queries, depth)
    else:
        tag, rankings = run.tag, (run.get(query.id, Ranking(query.id, ())) for query in queries)
    by_id = {query.id: query for query in queries}
    for ranking in rankings:
        # One at a time: the texts of all candidates may not fit into memory.
        (item,) = candidates_from_run(Run((ranking,), tag), by_id, collection.passages, depth)
        yield item.passages


def shuffled(items: Iterable[_Item], seed: str | int) -> list[_Item]:
    """Return the items in an order that a text or a number decides, in every process alike.

    A smaller sample, from the beginning, is a part of a larger one.
    """
    ordered = list(items)
    random.Random(seed).shuffle(ordered)
    return ordered


def _is_list(path: StrPath) -> bool:
    """Whether a file begins as a JSON list, and hence is no JSON Lines."""
    with open_binary(path) as file:
        return file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["


def _malformed(path: StrPath, place: int, group: Group, message: str) -> FormatError:
    """Return the error of a file's group, counted from 0."""
    if _is_list(path):
        return FormatError(path, None, f"question {group.query.id!r}: {message}")
    line, _ = next(itertools.islice(numbered_lines(path), place, None))
    return FormatError(path, line, message)
