"""What a collection holds, in numbers."""

from __future__ import annotations

from qpeft.data.collection import Collection


def info(collection: Collection) -> dict[str, object]:
    """Return what a collection holds; lengths are in words (parts between white space).

    `judged_but_missing` counts passages that the qrels name and the corpus does not have.
    """
    words = titled = 0
    for passage in collection.passages.values():
        words += len(passage.text.split())
        titled += bool(passage.title)
    count = len(collection.passages)
    return {
        "name": collection.name,
        "fingerprint": collection.fingerprint(),
        "passages": count,
        "passages_with_title": titled,
        "mean_passage_words": _mean(words, count),
        "splits": {split: _split_info(collection, split) for split in collection.splits()},
    }


def _split_info(collection: Collection, split: str) -> dict[str, object]:
    queries, qrels = collection.queries(split), collection.qrels(split)
    grades = [grade for judgements in qrels.values() for grade in judgements.values()]
    named = {passage_id for judgements in qrels.values() for passage_id in judgements}
    return {
        "queries": len(queries),
        "mean_query_words": _mean(sum(len(query.text.split()) for query in queries.values()), len(queries)),
        "judged_per_query": _mean(len(grades), len(qrels)),
        "relevant_per_query": _mean(sum(grade >= 1 for grade in grades), len(qrels)),
        "share_with_answers": _mean(sum(bool(query.answers) for query in queries.values()), len(queries)),
        "judged_but_missing": sum(passage_id not in collection.passages for passage_id in named),
    }


def _mean(total: int, count: int) -> float:
    return total / count if count else 0.0
