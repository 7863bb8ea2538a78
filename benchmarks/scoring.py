"""Scoring speed beside other ways to do the same work, all in one run and in turn.

    python benchmarks/scoring.py --output benchmarks/results/scoring-tiny-lm-cpu.json
    python benchmarks/scoring.py --shape qwen3-0.6b --output benchmarks/results/scoring-qwen3-0.6b-cpu.json
    python benchmarks/scoring.py --ablation --output benchmarks/results/ablation-tiny-lm-cpu.json
    python benchmarks/scoring.py --profile benchmarks/results/profile-tiny-lm-cpu.txt

`--collection DIR` takes a BEIR folder instead of the embedded collection, `--quick` tries everything on a few pairs.
Peers are installed by `make bench-env`, into an environment of their own.

From texts to scores, tokenising included: the plain loop in float32 and bfloat16 (`naive.py`), other packages
(`peers.py`), ours without a passage cache, with an empty one, and with a filled one; and the bare matrix products that
the pairs need (`ceiling.py`). The loop and ours must give the same scores, or the comparison is void and the script
fails.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import ablation
import pairs
import tables
from ceiling import Ceiling, needed
from naive import Loop, logits_bytes
from peers import OURS_T5, Score, open_peers, reason
from qpeft.lm.context_store import ContextStore
from qpeft.loading import load_lm
from qpeft.methods.query_likelihood import Config, QueryLikelihood, build_scorer
from qpeft.model_config import EMBEDDED, ModelConfig
from qpeft.pointwise import Pointwise
from qpeft.types import Candidates
from rounds import Case, interleave, made, ratio, set_up
from shapes import MAX_LENGTH, SHAPES, model_folder

TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05, "float16": 0.02}
"""Nats per query token by which a score may differ from the loop's in float32."""
ROWS = (16, 32, 64)
LOGITS = 2 * 2**30
"""Bytes that the loop's log-probabilities may take; larger batches are not tried, but one of them always is."""
STORE = 8
"""GiB of passage cache."""
SIZES = {True: (3, 64, 5), False: (2, 16, 3)}
"""Queries, candidates of each, and rounds: for the embedded model, and for larger ones."""
T5_PAIRS = 32
"""Candidates of the first query that are scored with a T5, by the other packages and by ours."""
LOOP, LOOP_HALF = "plain loop, fp32", "plain loop, bf16"
OURS, COLD, WARM = "qpeft", "qpeft, passage cache empty", "qpeft, passage cache filled"
COMPILED = "qpeft --compile yes"
BARE, BARE_FLOAT = "matrix products alone", "matrix products alone, fp32"
TARGETS = {
    True: (
        (OURS, LOOP, 10.0),
        (OURS, "sentence-transformers CrossEncoder, fp32", 3.0),
        (OURS, "sentence-transformers CrossEncoder, bf16", 1.2),
        (OURS, BARE, 0.6),
        (WARM, OURS, 4.0),
    ),
    False: ((OURS, LOOP, 5.0), (OURS, BARE, 0.5), (COMPILED, BARE, 0.5)),
}
"""What is wanted: a case, what it is measured against, and how many times as many pairs a second."""


class DisagreementError(Exception):
    """Two ways to compute the same scores do not; what they take cannot be compared."""


def plain(lm: Any) -> QueryLikelihood:
    """Return our scorer, fresh: it knows no passage's tokens yet."""
    return build_scorer(Config(template="plain"), lm)


def best_loop(model: Any, tokenizer: Any, items: Sequence[Candidates]) -> tuple[Loop, dict[str, Any]]:
    """Return the loop with the batch size that is quickest here, and what each size did."""
    width = max(len(tokenizer(passage.text)["input_ids"]) for passage in items[0].passages)
    tried: dict[str, Any] = {}
    best: tuple[float, Loop] | None = None
    for rows in ROWS:
        wanted = logits_bytes(model.config.get_text_config().vocab_size, rows, width)
        if wanted > LOGITS and best is not None:
            tried[str(rows)] = f"not run: its log-probabilities would take {wanted / 2**30:.1f} GiB"
            continue
        loop = Loop(model, tokenizer, rows)
        case = Case(lambda loop=loop: loop(items), len(items[0].passages))
        for _ in range(2):  # the first time, PyTorch's libraries compile kernels for shapes that they have not met
            case.time()
        seconds = min(case.seconds)
        tried[str(rows)] = round(case.pairs / seconds, 2)
        if best is None or seconds < best[0]:
            best = (seconds, loop)
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


class Bench:
    """The pairs, and the models that score them.

    `first` are the first query's candidates: the loop's batch size is chosen with them, and scores are compared.
    """

    def __init__(self, args: argparse.Namespace, workplace: Path) -> None:
        self.items = pairs.candidates(args.collection, args.queries, args.depth, args.depth, args.split)
        self.first = self.items[:1]
        self.count, self.first_count = len(pairs.texts(self.items)), len(pairs.texts(self.first))
        self.dtype = args.dtype
        self.folder = model_folder(args.shape, workplace / "model")
        self.lm = self.open(args.dtype)
        self.compiled = self.open(args.dtype, compile="yes")
        self.cached = self.open(args.dtype, passage_cache=STORE)
        self.warm = plain(self.cached)
        self.loops: dict[str, Loop] = {}
        self.tried: dict[str, Any] = {}
        for name, dtype in ((LOOP, torch.float32), (LOOP_HALF, torch.bfloat16)):
            model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=dtype)
            self.loops[name], self.tried[name] = best_loop(model, self.lm.tokenizer, self.first)
        self.rows = plain(self.lm).prepare(pairs.texts(self.items)).rows
        self.bare = Ceiling(*needed(self.lm, self.rows), getattr(torch, args.dtype), "cpu")
        self.bare_float = Ceiling(*needed(self.lm, self.rows), torch.float32, "cpu")

    def open(self, dtype: str, **options: Any) -> Any:
        """Return the model as our commands open it."""
        return load_lm(ModelConfig(self.folder, device="cpu", dtype=dtype, max_length=MAX_LENGTH, **options))

    def agreement(self) -> dict[str, dict[str, float]]:
        """Score the first query's candidates in all ways that should agree, and fill the passage cache.

        Raises:
            DisagreementError: they do not.
        """
        one = pairs.texts(self.first)
        scores: dict[str, Sequence[float]] = {name: loop(self.first) for name, loop in self.loops.items()}
        scores[OURS] = plain(self.lm).score(one)
        # of all, so that what batches side by side need is compiled before it is timed
        scores[COMPILED] = plain(self.compiled).score(pairs.texts(self.items))[: self.first_count]
        scores[COLD] = self.warm.score(one)
        scores[WARM] = self.warm.score(one)
        self.warm.score(pairs.texts(self.items))
        scores["qpeft, fp32"] = plain(self.open("float32")).score(one)
        return check(scores, self.dtype)

    def cases(self) -> dict[str, Case]:
        """Return what is timed of ours, of the loop and of the bare products."""
        filled = self.cached.store

        def store(kept: bool) -> None:
            self.cached.store = filled if kept else ContextStore(STORE * 2**30)

        def ranked(scorer: Callable[[], QueryLikelihood]) -> Callable[[], Any]:
            return lambda: list(Pointwise(scorer()).rerank(self.items))

        return {
            **{name: Case(lambda loop=loop: loop(self.items), self.count) for name, loop in self.loops.items()},
            OURS: Case(ranked(lambda: plain(self.lm)), self.count),
            COMPILED: Case(ranked(lambda: plain(self.compiled)), self.count),
            COLD: Case(ranked(lambda: plain(self.cached)), self.count, before=lambda: store(False)),
            WARM: Case(ranked(lambda: self.warm), self.count, before=lambda: store(True)),
            BARE: Case(self.bare, self.count),
            BARE_FLOAT: Case(self.bare_float, self.count),
        }


def compare(args: argparse.Namespace, workplace: Path) -> dict[str, Any]:
    """Measure everything side by side."""
    bench = Bench(args, workplace)
    agreement = bench.agreement()
    cases = bench.cases()
    few = [Candidates(bench.first[0].query, bench.first[0].passages[:T5_PAIRS])]
    theirs, absent = warmed(*open_peers(args.shape, bench.folder, workplace), few)
    for name, score in theirs.items():
        cases[name] = timed(score, few if counterpart(name) == OURS_T5 else bench.items)
    interleave(cases, args.rounds)
    return {
        "kind": "scoring",
        "shape": args.shape,
        "dtype": args.dtype,
        "attention": bench.lm.attention_kernel,
        "batch tokens": bench.lm.batch_tokens,
        "batch tokens with a cache": bench.cached.batch_tokens,
        "pairs": pairs.facts(bench.items),
        "gflop per pair": round(bench.bare.flops / bench.count / 1e9, 3),
        "gflop per second, alone": round(bench.bare.flops / min(cases[BARE].seconds) / 1e9, 1),
        "loop batch sizes": bench.tried,
        "agreement": agreement,
        "cases": {name: case.result() for name, case in cases.items()},
        "absent": absent,
        "against": {name: ratio(cases[counterpart(name)], case) for name, case in cases.items()},
        "targets": targets(cases, args.shape),
    }


def timed(score: Score, items: Sequence[Candidates]) -> Case:
    """Return a peer's case."""
    return Case(lambda: score(items), len(pairs.texts(items)))


def counterpart(name: str) -> str:
    """Return which of ours reads the same model."""
    return OURS_T5 if name.endswith("(T5)") else OURS


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
        queries, depth, rounds = ablation.QUERIES, ablation.DEPTH, ablation.ROUNDS
    if args.quick:
        queries, depth, rounds = 2, 4, 2
    for name, value in (("queries", queries), ("depth", depth), ("rounds", rounds)):
        if getattr(args, name) is None:
            setattr(args, name, value)
    assert args.shape == EMBEDDED or args.shape in SHAPES
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    set_up(args.threads)
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
