"""What calibrations are worth on queries, and on collections, that they were not fitted on.

Each --run is NAME COLLECTION SPLIT FILE, a run made by `qpeft rerank`. Within a collection: five-fold cross-validation
over queries; and the same with lists of five candidates, drawn from the others' lists, after fitting on whole ones.
Between two: fitted on all of one, applied to all of the other.
Usage: python benchmarks/calibration.py --run mini mini dev mini.trec --run squad path/to/squad dev squad.trec
       [--output benchmarks/results/calibration.json]
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

import numpy as np

from qpeft.data.collection import open_collection
from qpeft.data.trec import read_run
from qpeft.evaluation.calibration import (
    JudgedPairs,
    brier,
    expected_calibration_error,
    fit,
    folds,
    judged_pairs,
    keep,
    out_of_fold,
    separation,
)
from qpeft.provenance import provenance_path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--run", nargs=4, action="append", required=True, metavar=("NAME", "COLLECTION", "SPLIT", "FILE")
    )
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    found, made = {}, {}
    for name, collection, split, path in args.run:
        facts = json.loads(provenance_path(Path(path)).read_text())
        made[name] = {
            "model": facts["model"]["name"],
            "adapter": facts.get("adapter"),
            "dtype": facts["model"]["dtype"],
        }
        qrels = open_collection(collection).qrels(split)
        found[name] = judged_pairs(read_run(path), qrels, facts["options"]["depth"])
    result = {
        "within": {name: {**made[name], **within(pairs)} for name, pairs in found.items()},
        "between": [
            {"fitted on": one, "applied to": other, **between(found[one], found[other])}
            for one, other in itertools.permutations(found, 2)
            if made[one] == made[other]
        ],
    }
    text = json.dumps(rounded(result), indent=1)
    print(text)
    if args.output:
        args.output.write_text(text + "\n")


def rounded(value: object) -> object:
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return round(value, 4) if isinstance(value, float) else value


def within(pairs: JudgedPairs) -> dict[str, object]:
    fold = folds(pairs, 5)
    base = brier(out_of_fold(None, pairs, fold), pairs.relevant)
    own, across = separation(pairs)
    return {
        "queries": pairs.queries,
        "pairs": len(pairs.scores),
        "relevant": int(pairs.relevant.sum()),
        "separation": {"within": own, "across": across, "across centred": separation(pairs.centred())[1]},
        "quality": {
            f"{method}{', centred' * centred}": quality(out_of_fold(method, some, fold), pairs, base, fold)
            for centred, some in ((False, pairs), (True, pairs.centred()))
            for method in ("platt", "isotonic")
        },
        "lists of five": of_five(pairs, fold),
    }


def of_five(pairs: JudgedPairs, fold: np.ndarray) -> dict[str, object]:
    rng = np.random.default_rng(0)
    chosen = np.zeros(len(pairs.scores), dtype=bool)
    for number in np.unique(pairs.query):
        own = np.flatnonzero(pairs.query == number)
        chosen[rng.choice(own, min(5, len(own)), replace=False)] = True
    short = JudgedPairs(pairs.scores[chosen], pairs.relevant[chosen], pairs.query[chosen])
    base = brier(out_of_fold(None, pairs, fold)[chosen], short.relevant)
    found = np.empty(len(short.scores))
    for number in np.unique(fold):
        held = fold[chosen] == number
        whole = pairs.centred()
        fitted = fit("platt", whole.scores[fold != number], whole.relevant[fold != number])
        found[held] = fitted(short.centred().scores[held])
    return {
        "pairs": len(short.scores),
        "relevant": int(short.relevant.sum()),
        "platt": quality(out_of_fold("platt", pairs, fold)[chosen], short, base, fold[chosen]),
        "platt, centred": quality(found, short, base, fold[chosen]),
    }


def between(one: JudgedPairs, other: JudgedPairs) -> dict[str, object]:
    # All that is known of the other collection is the first one's base rate.
    base = brier(np.full(len(other.scores), one.relevant.mean()), other.relevant)
    fold = folds(other, 5)
    found = {}
    for name, left, right in (("platt", one, other), ("platt, centred", one.centred(), other.centred())):
        found[name] = quality(fit("platt", left.scores, left.relevant)(right.scores), other, base, fold)
    return found


def quality(found: np.ndarray, pairs: JudgedPairs, base: float, fold: np.ndarray) -> dict[str, object]:
    kept = keep(0.5, found, pairs, fold)
    return {
        "skill": 1 - brier(found, pairs.relevant) / base,
        "promised": float(found.mean()),
        "relevant": float(pairs.relevant.mean()),
        "ece": expected_calibration_error(found, pairs.relevant),
        "at 0.5": {
            "per query": kept.per_query,
            "promised": kept.promised,
            "relevant": kept.precision,
            "recall": kept.recall,
        },
    }


if __name__ == "__main__":
    main()
