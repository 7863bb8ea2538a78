"""Scoring speed beside other ways to do the same work, all in one run and in turn.

    python benchmarks/scoring.py --collection DIR --output benchmarks/results/scoring-tiny-lm-cpu.json
    python benchmarks/scoring.py --collection DIR --shape qwen3-0.6b --output benchmarks/results/scoring-qwen3-0.6b-cpu.json
    python benchmarks/scoring.py --collection DIR --ablation --output benchmarks/results/ablation-tiny-lm-cpu.json
    python benchmarks/scoring.py --collection DIR --profile benchmarks/results/profile-tiny-lm-cpu.txt

DIR is a BEIR folder; without one, the embedded collection is taken. `--quick` tries everything on a few pairs. Each takes
three to seven minutes on two cores. Peers are installed by `make bench-env`, into an environment of their own.

From texts to scores, tokenising included: the plain loop in float32 and bfloat16 (`naive.py`), other packages
(`peers.py`), ours without a passage cache, with an empty one, and with a filled one; and the bare matrix products that
the pairs need (`ceiling.py`). The loop and ours must give the same scores, or the comparison is void and the script fails.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rounds import Case, interleave, made, quiet_libraries, ratio, set_threads

quiet_libraries()

import torch  # noqa: E402 — after the environment is set
from transformers import AutoModelForCausalLM  # noqa: E402

import ablation  # noqa: E402
import pairs  # noqa: E402
import tables  # noqa: E402
from ceiling import Ceiling, needed  # noqa: E402
from naive import Loop, logits_bytes  # noqa: E402
from peers import Score, open_peers, reason  # noqa: E402
from qpeft.context_store import ContextStore  # noqa: E402
from qpeft.loading import load_lm  # noqa: E402
from qpeft.methods.query_likelihood import Config, QueryLikelihood, build_scorer  # noqa: E402
from qpeft.model_config import EMBEDDED, ModelConfig  # noqa: E402
from qpeft.types import Candidates  # noqa: E402
from shapes import MAX_LENGTH, SHAPES, model_folder  # noqa: E402

TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05, "float16": 0.02}
"""Nats per query token by which a score may differ from the loop's in float32."""
ROWS = (16, 32, 64)
LOGITS = 4 * 2**30
"""Bytes that the loop's log-probabilities may take; larger batches are not tried."""
SIZES = {True: (3, 64, 5), False: (2, 16, 3)}
"""Queries, candidates of each, and rounds: for the embedded model, and for larger ones."""
PEER_PAIRS = 32
LOOP, LOOP_HALF = "plain loop, fp32", "plain loop, bf16"
OURS, COLD, WARM = "qpeft", "qpeft, passage cache empty", "qpeft, passage cache filled"
BARE, BARE_FLOAT = "matrix products alone", "matrix products alone, fp32"
TARGETS = {
    True: (
        (OURS, LOOP, 10.0),
        (OURS, "sentence-transformers CrossEncoder, fp32", 3.0),
        (OURS, "sentence-transformers CrossEncoder, bf16", 1.2),
        (OURS, BARE, 0.6),
        (WARM, OURS, 4.0),
    ),
    False: ((OURS, LOOP, 5.0), (OURS, BARE, 0.5)),
}
"""What is wanted: a case, what it is measured against, and how many times as many pairs a second."""


class DisagreementError(Exception):
    """Two ways to compute the same scores do not; what they take cannot be compared."""


def plain(lm: Any) -> QueryLikelihood:
    """Return our scorer, fresh: it knows no passage's tokens yet."""
    return build_scorer(Config(template="plain"), lm)


def best_loop(model: Any, tokenizer: Any, items: Sequence[Candidates]) -> tuple[Loop, dict[str, Any]]:
    """Return the loop with the batch size that is quickest here, and what each size did."""
    width = max(len(text.split()) for item in items for text in [p.text for p in item.passages]) * 2
    tried: dict[str, Any] = {}
    best: tuple[float, Loop] | None = None
    for rows in ROWS:
        wanted = logits_bytes(model.config.get_text_config().vocab_size, rows, width)
        if wanted > LOGITS:
            tried[str(rows)] = f"not run: its log-probabilities would take {wanted / 2**30:.1f} GiB"
            continue
        loop = Loop(model, tokenizer, rows)
        case = Case(lambda loop=loop: loop(items[:1]), len(items[0].passages))
        case.time()
        tried[str(rows)] = round(case.pairs / case.seconds[0], 2)
        if best is None or case.seconds[0] < best[0]:
            best = (case.seconds[0], loop)
        if rows >= len(items[0].passages):
            break
    assert best is not None
    return best[1], tried


def check(scores: dict[str, Sequence[float]], dtype: str) -> dict[str, dict[str, float]]:
    """Compare scores with the float32 loop's.

    Raises:
        DisagreementError: one is further off than its number type allows.
    """
    truth = torch.tensor(scores[LOOP])
    found = {}
    for name, own in scores.items():
        if name == LOOP:
            continue
        kind = "float32" if name.endswith("fp32") else "bfloat16" if name == LOOP_HALF else dtype
        off = float((torch.tensor(own) - truth[: len(own)]).abs().max())
        found[name] = {"largest difference": off, "tolerance": TOLERANCE[kind]}
        if not off <= TOLERANCE[kind]:
            raise DisagreementError(f"{name} is {off:.4g} nats off the plain loop; {TOLERANCE[kind]} is allowed")
    return found


def compare(args: argparse.Namespace, workplace: Path) -> dict[str, Any]:
    """Measure everything side by side."""
    items = pairs.candidates(args.collection, args.queries, args.depth, args.depth, args.split)
    first, everything = items[:1], pairs.texts(items)
    folder = model_folder(args.shape, workplace / "model")
    settings = {"device": "cpu", "dtype": args.dtype, "max_length": MAX_LENGTH}
    lm: Any = load_lm(ModelConfig(folder, **settings))
    cached: Any = load_lm(ModelConfig(folder, passage_cache=8, **settings))
    loops, tried = {}, {}
    for name, dtype in ((LOOP, torch.float32), (LOOP_HALF, torch.bfloat16)):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        loops[name], tried[name] = best_loop(model, lm.tokenizer, items)
    warm = plain(cached)
    scores: dict[str, Sequence[float]] = {name: loop(first) for name, loop in loops.items()}
    one = pairs.texts(first)
    scores[OURS] = plain(lm).score(one)
    scores[COLD] = warm.score(one)
    warm.score(everything)
    filled = cached.store
    scores[WARM] = warm.score(one)
    exact = load_lm(ModelConfig(folder, **{**settings, "dtype": "float32"}))
    scores["qpeft, fp32"] = plain(exact).score(one)
    del exact
    agreement = check(scores, args.dtype)

    rows = plain(lm).prepare(everything).rows
    bare = Ceiling(*needed(lm, rows), getattr(torch, args.dtype), "cpu")
    bare_float = Ceiling(*needed(lm, rows[: len(one)]), torch.float32, "cpu")

    def use(store: ContextStore | None) -> Callable[[], None]:
        return lambda: setattr(cached, "store", ContextStore(8 * 2**30) if store is None else store)

    cases = {name: Case(lambda loop=loop: loop(first), len(one)) for name, loop in loops.items()}
    cases[OURS] = Case(lambda: [plain(lm).score(pairs.texts([item])) for item in items], len(everything))
    cases[COLD] = Case(
        lambda: [plain(cached).score(pairs.texts([item])) for item in items], len(everything), before=use(None)
    )
    cases[WARM] = Case(
        lambda: [warm.score(pairs.texts([item])) for item in items], len(everything), before=use(filled)
    )
    cases[BARE] = Case(bare, len(everything))
    cases[BARE_FLOAT] = Case(bare_float, len(one))
    some = [Candidates(first[0].query, first[0].passages[:PEER_PAIRS])]
    theirs, absent = warmed(*open_peers(args.shape, folder, workplace), some)
    cases |= {name: Case(lambda score=score: score(some), len(some[0].passages)) for name, score in theirs.items()}
    interleave(cases, args.rounds)
    return {
        "kind": "scoring",
        "shape": args.shape,
        "dtype": args.dtype,
        "pairs": pairs.facts(items),
        "gflop per pair": round(bare.flops / len(everything) / 1e9, 3),
        "gflop per second": round(bare.flops / min(cases[BARE].seconds) / 1e9, 1),
        "loop batch sizes": tried,
        "agreement": agreement,
        "cases": {name: case.result() for name, case in cases.items()},
        "absent": absent,
        "against": {name: ratio(cases[OURS], case) for name, case in cases.items() if name != OURS},
        "targets": targets(cases, args.shape),
    }


def warmed(
    theirs: dict[str, Score], absent: dict[str, str], items: Sequence[Candidates]
) -> tuple[dict[str, Score], dict[str, str]]:
    """Run each peer once on a few pairs; one that fails is absent."""
    few = [Candidates(item.query, item.passages[:2]) for item in items]
    working = {}
    for name, score in theirs.items():
        try:
            score(few)
            working[name] = score
        except Exception as error:  # a peer's failure is a finding, whatever it is
            absent[name] = reason(error)
    return working, absent


def targets(cases: dict[str, Case], shape: str) -> list[dict[str, Any]]:
    """Return what was wanted beside what came out."""
    found = []
    for case, other, wanted in TARGETS[shape == EMBEDDED]:
        measured = ratio(cases[case], cases[other]) if other in cases else None
        met = None if measured is None else measured["median"] >= wanted
        found.append({"case": case, "against": other, "wanted": wanted, "measured": measured, "met": met})
    return found


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--collection", default="mini", help="a BEIR folder; by default the embedded collection")
    parser.add_argument("--split", default="test")
    parser.add_argument("--shape", choices=[EMBEDDED, "tiny", "qwen3-0.6b"], default=EMBEDDED)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of ours")
    parser.add_argument("--queries", type=int)
    parser.add_argument("--depth", type=int, help="candidates of each query")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--quick", action="store_true", help="a few pairs and two rounds, to see that it runs")
    parser.add_argument("--ablation", action="store_true", help="ours alone, one part changed at a time")
    parser.add_argument("--profile", type=Path, help="write where the time of ours goes, as text")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args(arguments)
    queries, depth, rounds = SIZES[args.shape == EMBEDDED]
    if args.ablation:
        queries, depth = ablation.QUERIES, ablation.DEPTH
    if args.quick:
        queries, depth, rounds = 2, 4, 2
    for name, value in (("queries", queries), ("depth", depth), ("rounds", rounds)):
        if getattr(args, name) is None:
            setattr(args, name, value)
    assert args.shape == EMBEDDED or args.shape in SHAPES
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    set_threads(args.threads)
    with tempfile.TemporaryDirectory() as workplace:
        if args.profile:
            ablation.profile(args, Path(workplace))
            return
        measure = ablation.measure if args.ablation else compare
        try:
            result = measure(args, Path(workplace))
        except DisagreementError as error:
            sys.exit(f"void: {error}")
    result["collection"] = Path(args.collection).name
    result["made"] = made()
    print(tables.render(result))
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
