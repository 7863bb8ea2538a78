"""Queries with candidates to measure with, from a BEIR folder or the embedded collection."""

from __future__ import annotations

import random
from collections.abc import Sequence

from qpeft.data.collection import open_collection
from qpeft.types import Candidates, Passage, Query


def candidates(name: str, queries: int, depth: int, pool: int, split: str = "test") -> list[Candidates]:
    """Return queries with `depth` candidates each, among them a relevant one, all from the same `pool` of passages.

    A passage so is a candidate of `queries · depth / pool` queries on average, which is what a passage cache lives on.

    Args:
        name: a BEIR folder, or `mini`.
        queries: how many.
        depth: candidates of each.
        pool: different passages among all candidates; at least `depth`.
        split: of the collection.
    """
    rng = random.Random(0)
    collection = open_collection(name)
    judged = collection.queries(split)
    passages = collection.passages
    qrels = {q: [p for p, grade in judgements.items() if grade > 0 and p in passages]
             for q, judgements in collection.qrels(split).items()}  # fmt: skip
    chosen = rng.sample(sorted(q for q in judged if qrels[q]), queries)
    relevant = {q: rng.choice(qrels[q]) for q in chosen}
    own = list(dict.fromkeys(relevant.values()))
    others = rng.sample(sorted(set(passages) - set(own)), max(0, pool - len(own)))
    everything = [*own, *others][: max(pool, len(own))]
    found = []
    for q in chosen:
        rest = rng.sample([p for p in everything if p != relevant[q]], depth - 1)
        some = [relevant[q], *rest]
        rng.shuffle(some)
        found.append(Candidates(judged[q], tuple(passages[p] for p in some)))
    return found


def texts(items: Sequence[Candidates]) -> list[tuple[Query, Passage]]:
    """Return all pairs of some queries, in order."""
    return [(item.query, passage) for item in items for passage in item.passages]


def facts(items: Sequence[Candidates]) -> dict[str, float]:
    """Return what a result says of its pairs."""
    pairs = texts(items)
    different = {passage.id for _, passage in pairs}
    words = [len(f"{passage.title} {passage.text}".split()) for _, passage in pairs]
    return {
        "queries": len(items),
        "pairs": len(pairs),
        "passages": len(different),
        "pairs per passage": round(len(pairs) / len(different), 2),
        "words per passage": round(sum(words) / len(words), 1),
        "words per query": round(sum(len(query.text.split()) for query, _ in pairs) / len(pairs), 1),
    }
