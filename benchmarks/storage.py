"""What 8 bits cost: encoded passages kept exactly, as int8 and as fp8; room, scores, rankings and speed.

    python benchmarks/storage.py --collection path/to/a/BEIR/folder --output benchmarks/results/storage.json

BM25's first candidates of dev queries are ranked by the embedded model over encoded passages in each form of storage.
Compared with the exact ones: the scores (nats per query token), how many queries have another passage first, and
ranking quality.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any, get_args

import tables
from qpeft.data.candidates import candidates_from_run
from qpeft.data.collection import open_collection
from qpeft.evaluation.measures import evaluate
from qpeft.lm.context_store import ContextStore, Storage
from qpeft.loading import load_lm
from qpeft.methods.query_likelihood import Config, build
from qpeft.model_config import EMBEDDED, ModelConfig
from qpeft.retrieval.bm25 import BM25
from qpeft.types import Candidates, Run
from rounds import made, set_up

MEASURES = "nDCG@10 RR@10"


def candidates(collection: Any, split: str, queries: int, depth: int) -> list[Candidates]:
    """Return BM25's candidates of a sample of queries, or of all where there are no more."""
    known = collection.queries(split)
    chosen = [known[query_id] for query_id in random.Random(0).sample(sorted(known), min(queries, len(known)))]
    run = Run(BM25(collection.passages.values()).retrieve(chosen, depth), "bm25")
    return list(candidates_from_run(run, known, collection.passages, depth))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--collection", default="mini")
    parser.add_argument("--split", default="dev")
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args(arguments)
    set_up(args.threads)
    collection = open_collection(args.collection)
    items = candidates(collection, args.split, args.queries, args.depth)
    qrels = {item.query.id: collection.qrels(args.split)[item.query.id] for item in items}
    lm: Any = load_lm(ModelConfig(EMBEDDED))
    runs, rows = {}, {}
    for storage in get_args(Storage):
        lm.store = ContextStore(1 << 40, storage=storage)
        for _ in range(2):  # the second time, all are there
            started = time.perf_counter()
            runs[storage] = Run(build(Config(), lm).rerank(items), storage)
            seconds = time.perf_counter() - started
        tokens = sum(len(key[0]) for key in lm.store._kept)
        exact, own = ({(q, hit.passage_id): hit.score for q, ranking in runs[s].items() for hit in ranking.hits}
                      for s in ("exact", storage))  # fmt: skip
        off = [abs(own[pair] - exact[pair]) for pair in exact]
        first = [(runs[storage][q].hits[0], runs["exact"][q].hits[0]) for q in qrels]
        means = evaluate(runs[storage], qrels, MEASURES).means
        rows[storage] = {
            "bytes a token": lm.store.bytes_kept / tokens,
            "pairs/s, filled": len(exact) / seconds,
            "largest difference": max(off),
            "mean difference": statistics.mean(off),
            "other passage first": sum(one.passage_id != other.passage_id for one, other in first) / len(first),
            **means,
        }
    facts = {"collection": f"{collection.name} · {args.split}", "queries": len(items), "depth": args.depth}
    result = {"kind": "storage", **facts, "rows": rows, "made": made()}
    print(tables.render(result))
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
