"""What each part of our scorer wins: the full setting, and the same with one part changed; all in one run and in turn.

Run by `scoring.py --ablation`; `scoring.py --profile FILE` writes where the time goes.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.ao.quantization import quantize_dynamic

import pairs
from qpeft.lm import cpu_attention
from qpeft.lm.causal import CausalLM
from qpeft.lm.context_store import ContextStore
from qpeft.lm.depth import find_layers
from qpeft.lm.pretrained import RowLogProbs
from qpeft.loading import load_lm
from qpeft.methods.query_likelihood import Config, build, build_scorer
from qpeft.model_config import ModelConfig
from qpeft.template import Row
from qpeft.types import Candidates
from rounds import Case, interleave, ratio
from shapes import MAX_LENGTH, model_folder

QUERIES, DEPTH, PASSAGES, ROUNDS = 32, 16, 64, 3
FULL = "full"
STORE = 8 * 2**30
WHOLE_ROWS = {"qpeft.lm.cpu_attention.BLOCK": 10**6, "qpeft.lm.cpu_attention.MULTIPLE": 1}
"""What makes our attention take rows in one piece, however wide."""


class InOrder(CausalLM):
    """Batches rows in the order given, as many as fit, instead of sorting them by length."""

    def log_probs(self, rows: Sequence[Row], **options: Any) -> list[RowLogProbs]:
        """Return the log-probabilities of each row's scored tokens, in order; of the model alone."""
        options.pop("adapters", None)
        found: list[RowLogProbs] = []
        batch: list[Row] = []
        for row in rows:
            if batch and (len(batch) + 1) * max(map(len, [*batch, row])) > self.batch_tokens:
                found += super().log_probs(batch, **options)
                batch = []
            batch.append(row)
        return found + super().log_probs(batch, **options)


class WholeLastLayer(CausalLM):
    """Computes the last layer at all positions."""

    spares_last_layer = False


class OneAtATime(CausalLM):
    """Computes one batch after the other, with all threads."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._beside.width = lambda: 1  # type: ignore[method-assign]


class FullLogits:
    """A model that writes logits at all positions, and picks those that are wanted afterwards."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, *, logits_to_keep: Tensor, **inputs: Any) -> Any:
        """Return what the model returns, with logits `[1, N, V]`."""
        out = self._model(**inputs)
        out.logits = out.logits[logits_to_keep][None]
        return out


def log_softmax_whole(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return what `token_log_probs` does, with a float32 copy of all logits and `logsumexp`."""
    logits = logits.float()
    return logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(1)


class Bench:
    """One model, and our scorer around it in several settings.

    Args:
        folder: of the model.
        dtype: of the full setting.
        items: what is scored.
    """

    def __init__(self, folder: str, dtype: str, items: Sequence[Candidates]) -> None:
        self.settings = {"device": "cpu", "max_length": MAX_LENGTH}
        self.folder = folder
        self.items = items
        self.count = sum(len(item.passages) for item in items)
        self.lm: Any = load_lm(ModelConfig(folder, dtype=dtype, **self.settings))
        cached: Any = load_lm(ModelConfig(folder, dtype=dtype, passage_cache=1, **self.settings))
        self.cached_tokens: int = cached.batch_tokens
        self.padded: dict[str, float] = {}
        self.cases: dict[str, Case] = {}

    def again(self, kind: type[CausalLM] = CausalLM, **changes: Any) -> CausalLM:
        """Return another scorer around the same weights."""
        facts = {"name": self.lm.name, "max_length": MAX_LENGTH, "batch_tokens": self.lm.batch_tokens, **changes}
        same = kind(self.lm.model, self.lm.tokenizer, **facts)
        return same

    def add(
        self,
        name: str,
        lm: CausalLM,
        *,
        together: int | None = None,
        attention: str = cpu_attention.NAME,
        patches: Mapping[str, Any] | None = None,
    ) -> None:
        """Add a case that scores everything afresh, so many queries `together`, with other things put for some."""

        def run() -> None:
            with ExitStack() as changed:
                for target, value in (patches or {}).items():
                    changed.enter_context(mock.patch(target, value))
                for _ in build(Config(template="plain", queries_per_batch=together), lm).rerank(self.items):
                    pass

        def use() -> None:
            lm.model.set_attn_implementation(attention)

        use()
        with tokens_sent(lm.model) as sent:
            run()
        rows = build_scorer(Config(template="plain"), lm).prepare(pairs.texts(self.items)).rows
        self.padded[name] = round(1 - sum(len(row) - 1 for row in rows) / sum(sent), 4)
        self.cases[name] = Case(run, self.count, before=use)

    def add_cached(
        self, name: str, *, filled: bool, together: int | None = None, batch_tokens: int | None = None
    ) -> None:
        """Add a case with a passage cache, filled before the round or empty."""
        lm = self.again(store=ContextStore(STORE), batch_tokens=batch_tokens or self.cached_tokens)
        reranker = build(Config(template="plain", queries_per_batch=together), lm)

        def run() -> None:
            for _ in reranker.rerank(self.items):
                pass

        def before() -> None:
            self.lm.model.set_attn_implementation(cpu_attention.NAME)
            if not filled:
                lm.store = ContextStore(STORE)

        before()
        run()
        self.cases[name] = Case(run, self.count, before=before)


@contextmanager
def tokens_sent(model: Any) -> Iterator[list[int]]:
    """Note how many tokens, padding included, each forward pass gets."""
    sent: list[int] = []

    def note(_: Any, __: Any, inputs: dict[str, Any]) -> None:
        sent.append(inputs["input_ids"].numel())

    target = getattr(model, "_model", model) if isinstance(model, FullLogits) else model
    hook = target.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield sent
    finally:
        hook.remove()


def measure(args: argparse.Namespace, workplace: Path) -> dict[str, Any]:
    """Time the full setting and all changes of it."""
    passages = max(args.depth, min(PASSAGES, args.queries * args.depth // 2))
    items = pairs.candidates(args.collection, args.queries, args.depth, passages, args.split)
    bench = Bench(model_folder(args.shape, workplace / "model"), args.dtype, items)
    bench.add(FULL, bench.lm)
    bench.add("float32", load_lm(ModelConfig(bench.folder, dtype="float32", **bench.settings)))
    bench.add(
        "compiled (--compile yes)",
        load_lm(ModelConfig(bench.folder, dtype=args.dtype, compile="yes", **bench.settings)),
    )
    bench.add("layers in 8 bits, states scaled as they come", eight := eight_bits(bench))
    for name in ("sdpa", "eager"):
        bench.add(f"attention {name}", bench.again(), attention=name)
    own = {"qpeft.lm.cpu_attention.TILES": False}
    if cpu_attention.TILES:
        bench.add("our attention instead of the fused kernel", bench.again(), patches=own)
    bench.add("our attention over whole rows", bench.again(), patches=own | WHOLE_ROWS)
    bench.add("last layer at all positions", bench.again(WholeLastLayer))
    bench.add("one batch at a time, with all threads", bench.again(OneAtATime))
    ones = "causal.MULTIPLE", "encoding.MULTIPLE", "last_layer.MULTIPLE", "pretrained.ALIKE"
    unrounded = {**{f"qpeft.lm.{place}": 1 for place in ones}, "qpeft.lm.layout.EIGHTHS": 2**60}
    bench.add("shapes as they come", bench.again(), patches=unrounded)
    bench.add("padded left, with a mask", bench.again(padding_side="left"))
    bench.add("batches in the order given", bench.again(InOrder))
    whole = bench.again()
    whole.model = FullLogits(whole.model)
    bench.add("logits at all positions", whole)
    bench.add(
        "float32 copy of all logits, logsumexp",
        bench.again(),
        patches={"qpeft.lm.causal.token_log_probs": log_softmax_whole},
    )
    bench.add("each query by itself", bench.again(), together=1)
    bench.add("all queries together", bench.again(), together=len(items))
    for tokens in (8_192, 32_768):
        name = f"all queries together, batches of {tokens:,} tokens"
        bench.add(name, bench.again(batch_tokens=tokens), together=len(items))
    bench.add_cached("passage cache, empty", filled=False)
    bench.add_cached("passage cache, filled", filled=True)
    bench.add_cached("passage cache, filled, each query by itself", filled=True, together=1)
    bench.add_cached("passage cache, filled, batches as without", filled=True, batch_tokens=bench.lm.batch_tokens)
    changed = nats_changed(bench, eight)
    interleave(bench.cases, args.rounds)
    return {
        "kind": "ablation",
        "shape": args.shape,
        "dtype": args.dtype,
        "pairs": pairs.facts(items),
        "batch tokens": bench.lm.batch_tokens,
        "batch tokens with a cache": bench.cached_tokens,
        "cases": {name: case.result() for name, case in bench.cases.items()},
        "times full": {name: ratio(case, bench.cases[FULL]) for name, case in bench.cases.items() if name != FULL},
        "padded share": bench.padded,
        "nats per query token that 8 bits change": changed,
    }


def eight_bits(bench: Bench) -> CausalLM:
    """Return a scorer whose layers multiply 8-bit weights with states that are scaled to 8 bits as they come."""
    lm: Any = load_lm(ModelConfig(bench.folder, dtype="float32", **bench.settings))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch has given it to another package
        for layer in find_layers(lm.model).modules:
            quantize_dynamic(layer, {torch.nn.Linear}, dtype=torch.qint8, inplace=True)
    whole: CausalLM = lm
    return whole


def nats_changed(bench: Bench, lm: CausalLM) -> dict[str, float]:
    """Return by how much another scorer's mean log-likelihoods of query tokens differ."""
    scores = []
    for each in (bench.lm, lm):
        rankings = build(Config(template="plain"), each).rerank(bench.items)
        found = {(ranking.query_id, hit.passage_id): hit.score for ranking in rankings for hit in ranking.hits}
        scores.append(torch.tensor([found[key] for key in sorted(found)]))
    difference = (scores[0] - scores[1]).abs()
    return {"mean": round(float(difference.mean()), 4), "largest": round(float(difference.max()), 4)}


def profile(args: argparse.Namespace, workplace: Path) -> None:
    """Write torch's profiler tables of scoring without a cache and with a filled one.

    With one thread: batches side by side run in threads that the profiler does not see.
    """
    torch.set_num_threads(1)
    items = pairs.candidates(args.collection, args.queries, args.depth, args.depth, args.split)
    bench = Bench(model_folder(args.shape, workplace / "model"), args.dtype, items)
    bench.add(FULL, bench.lm)
    bench.add_cached("passage cache, filled", filled=True)
    parts = []
    for name, case in bench.cases.items():
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
            case.time()
        table = seen.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=40)
        what = f"{args.shape}, {args.dtype}, one thread, {name}"
        parts.append(f"{what}: {case.pairs} pairs in {case.seconds[-1]:.2f} s\n\n{table}")
    args.profile.write_text("\n\n".join(parts), encoding="utf-8")
