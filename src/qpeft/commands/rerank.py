"""Order the candidates of a run with a language model.

Only what stands in the run is ranked. Passages below the depth keep their order, after the reranked ones. Finished
queries go to OUTPUT.partial; after an interruption, --resume continues there and the result is the same to the byte.
What the same command finished before, --resume leaves as it is.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qpeft import methods
from qpeft.atomic import is_stream
from qpeft.commands._output import check_output
from qpeft.commands._partial import Partial
from qpeft.commands._peek import peek_method
from qpeft.commands._progress import progress_bar
from qpeft.commands._run_provenance import read_run_provenance, scored_depth
from qpeft.commands._same_work import is_finished
from qpeft.commands._sample import sample_run
from qpeft.commands._unfinished import open_as_begun
from qpeft.data.candidates import candidates_from_run, check_run
from qpeft.data.collection import identity, open_collection
from qpeft.data.trec import read_run, write_run
from qpeft.errors import InputError, OptionError
from qpeft.evaluation.cost import Cost, forget_peak_memory, peak_memory
from qpeft.evaluation.interpolation import interpolate
from qpeft.evaluation.tables import rounded
from qpeft.model_config import ModelConfig
from qpeft.provenance import input_fingerprint, options_of, provenance, write_provenance
from qpeft.types import Ranking, Run, ScoringCounts


@dataclass(frozen=True)
class Config:
    """Reranking."""

    collection: str
    """A BEIR folder, mini (embedded), or ir_datasets:ID."""
    run: str
    """The first stage's run."""
    output: str
    """The run file to write (.gz packs it)."""
    split: str = "test"
    """Whose queries."""
    method: str | None = None
    """How passages are scored: [methods]; by default as the adapter was trained, else query_likelihood. Its options are
    below, those of another with --method NAME --help."""
    depth: int = 100
    """Passages per query that are reranked."""
    interpolate: float | None = None
    """Weight of the first stage's scores, in [0, 1]; choose it on dev (qpeft interpolate)."""
    limit_queries: int | None = None
    """Rerank a random sample of this many queries only."""
    seed: int = 0
    """Of the sample."""
    tag: str | None = None
    """Name of the system in the run file; by default the method."""
    resume: bool = False
    """Continue an interrupted run; do nothing if it is finished."""

    def __post_init__(self) -> None:
        check_output(self.output, self.tag, read=[self.run])
        if is_stream(self.output):
            raise OptionError(f"--output {self.output}: is a pipe or stream, and unfinished work is kept beside a file")
        if self.interpolate is not None and not 0 <= self.interpolate <= 1:
            raise OptionError(f"--interpolate is {self.interpolate}; it must be between 0 and 1")
        if self.resume and Path(self.run).exists() and not Path(self.run).is_file():
            raise OptionError(f"--resume: --run {self.run} is a pipe: whether it is the same run cannot be told")


def configs(arguments: Sequence[str]) -> tuple[type[Any], ...]:
    """Return this command's options, those of the model and those of the method."""
    return Config, ModelConfig, methods.load(peek_method(arguments)).Config


def run(config: Config, model: ModelConfig, method: Any) -> None:
    """Rerank, write the run and its provenance, and say what happened to the input."""
    name = methods.chosen(config.method, getattr(method, "adapter", None))
    config = dataclasses.replace(config, method=name)
    collection = open_collection(config.collection)
    queries = collection.queries(config.split)
    first = sample_run(read_run(config.run), config.limit_queries, config.seed, config.depth)
    if not first:
        raise InputError(f"{config.run} ranks no query")
    check_run(first, queries, collection.passages, config.depth)
    if config.interpolate is not None:
        scored = scored_depth(config.run, read_run_provenance(config.run))
        if scored is not None and any(len(ranking.hits[: config.depth]) > scored for ranking in first.values()):
            raise OptionError(f"--interpolate: {config.run} scores its first {scored} only; take --depth {scored}")

    import torch

    forget_peak_memory()  # what was done before in this process is not of this run
    partial = Partial(Path(config.output), config.resume)
    lm = open_as_begun(model, partial.settings)
    if lm.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(lm.device)
    described = lm.describe()
    facts: dict[str, Any] = {
        "command": "rerank",
        "options": options_of(config, model, method),
        "collection": identity(collection, config.split),
        "first_stage": {"tag": first.tag, "sha256": input_fingerprint(config.run)},
        "model": described,
    }
    reranker = methods.load(name).build(method, lm)
    if config.interpolate is not None and not reranker.scores_all:
        raise OptionError(f"--interpolate needs scores of all candidates; --method {name} gives some none")
    facts |= reranker.facts
    may_be_finished = config.resume and not partial.settings and Path(config.output).is_file()
    if may_be_finished and is_finished(read_run_provenance(config.output), facts):
        print(f"{config.output}: finished before, with the same options, data and model", file=sys.stderr)
        return
    for query_id in first:
        reranker.check(queries[query_id])
    # What is done after scoring may be asked for otherwise when an interrupted run goes on.
    scoring = {name: value for name, value in facts["options"].items() if name not in ("tag", "interpolate")}
    settings = {"dtype": described["dtype"], "threads": torch.get_num_threads()}
    partial.open({**facts, "options": scoring}, settings, reranker.query_batches)
    started = time.perf_counter()
    items = candidates_from_run(first, queries, collection.passages, config.depth)
    rankings = [ranking for ranking, _ in zip(partial.rankings, items, strict=False)]
    resumed_at = len(rankings)
    with closing(partial), progress_bar(name, len(first), resumed_at) as bar:
        for ranking in reranker.rerank(items):
            rankings.append(ranking)
            partial.add(ranking, reranker.counts)
            bar.advance(pairs=len(ranking.hits))
    seconds = time.perf_counter() - started
    counts = partial.counts(reranker.counts)
    reranked = _with_rest(first, rankings, config, config.tag or name)
    write_run(reranked, Path(config.output))
    cost = _cost(seconds, len(rankings) - resumed_at, reranker.counts.pairs, lm)
    facts |= {"counts": dataclasses.asdict(counts), "cost": cost.as_dict(), "resumed_at": resumed_at}
    write_provenance(Path(config.output), provenance(**facts))
    partial.remove()
    _say(config, counts, cost, cache_idle=lm.store is not None and not (cost.cached or cost.encoded))


def _with_rest(first: Run, rankings: list[Ranking], config: Config, tag: str) -> Run:
    """Mix in the first stage where asked to, and append the passages below the depth in their order."""
    whole = Run(
        (
            ranking.followed_by(hit.passage_id for hit in first[ranking.query_id].hits[config.depth :])
            for ranking in rankings
        ),
        tag,
    )
    if config.interpolate is None:
        return whole
    return interpolate(first, whole, config.interpolate, depth=config.depth, tag=tag)


def _cost(seconds: float, queries: int, pairs: int, lm: Any) -> Cost:
    import torch

    store = lm.store
    return Cost(
        seconds,
        queries,
        pairs,
        lm.computed.tokens,
        lm.computed.padding,
        lm.computed.flops,
        cached=None if store is None else store.hits,
        encoded=None if store is None else store.misses,
        peak_memory=peak_memory(),
        peak_device_memory=torch.cuda.max_memory_allocated(lm.device) if lm.device.type == "cuda" else None,
    )


def _say(config: Config, counts: ScoringCounts, cost: Cost, *, cache_idle: bool) -> None:
    print(f"{config.output}: {counts.pairs:,} pairs, {cost.passages_per_second:,.0f} passages/s", file=sys.stderr)
    print(f"  cost: {', '.join(_cost_parts(cost))}", file=sys.stderr)
    notes = {
        "passages were cut to fit": counts.truncated_passages,
        "passages have no tokens and were ranked last": counts.empty_passages,
        "queries got one score for all their passages": counts.constant_queries,
    }
    for what, count in notes.items():
        if count:
            print(f"  note: {count:,} {what}", file=sys.stderr)
    if cache_idle and counts.pairs:
        print("  note: the passage cache was of no use: it is for plain query likelihood", file=sys.stderr)


def _cost_parts(cost: Cost) -> Iterator[str]:
    yield f"{cost.tokens_per_second:,.0f} tokens/s"
    if cost.padded_share is not None:
        yield f"{cost.padded_share:.1%} padding"
    if cost.cache_hit_rate is not None:
        yield f"{cost.cache_hit_rate:.1%} of passages cached"
    if cost.teraflops_per_query is not None:
        yield f"{rounded(cost.teraflops_per_query)} TFLOP/query"
        yield f"{rounded(cost.queries_per_petaflop)} queries/PetaFLOP"
    for kind, peak in (("", cost.peak_memory), ("GPU ", cost.peak_device_memory)):
        if peak is not None:
            yield f"{kind}memory up to {peak / 2**20:,.0f} MiB"
