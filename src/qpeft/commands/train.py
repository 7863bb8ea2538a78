"""Train an adapter: a small module that writes into the input of the frozen language model, or LoRA in its layers.

Takes a collection with judgements (negatives are mined with BM25, or taken from --run) or a file of groups
(--train-file, JSON Lines as of FlagEmbedding or Tevatron, or DPR's JSON). The best state by a dev ranking is kept.
After an interruption, --resume continues at the last checkpoint, and the result is the same.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qpeft import adapters, methods
from qpeft.commands._checkpoints import BEGUN, claim, clear, leave_mark, read_begun, read_mark
from qpeft.commands._peek import peek
from qpeft.commands._same_work import check_same
from qpeft.commands._training_data import (
    find_dev_candidates,
    fingerprints,
    read_teacher,
    read_training_groups,
    say,
    say_counts,
)
from qpeft.commands._unfinished import open_as_begun
from qpeft.data.collection import open_collection
from qpeft.data.records import read_json
from qpeft.errors import InputError, OptionError, PassageCacheError, at_least, nearest
from qpeft.model_config import ModelConfig
from qpeft.options import Checked
from qpeft.provenance import options_of, provenance
from qpeft.template import Template, load_template
from qpeft.training import config as training_config
from qpeft.training.config import TrainingConfig
from qpeft.training.groups import next_queries
from qpeft.training.processes import processes
from qpeft.types import Group, Passage, Query

if TYPE_CHECKING:  # so that options can be listed without importing torch
    from transformers import TrainerCallback

    from qpeft.adapter import Adapter
    from qpeft.adapters._folder import AdapterFolder

PRESETS = ("stable", "authors")
WHAT_DECIDES = ("options", "files", "collection", "template")
"""What must agree, beside the model's weights, for a finished adapter to be what a resumed training would make."""


@dataclass(frozen=True)
class Config(Checked):
    """Data and output."""

    output: str
    """The adapter folder to write."""
    adapter: str = "qpeft_a"
    """What is trained: [adapters]. Its own options are below, those of another with --adapter NAME --help."""
    method: str = "query_likelihood"
    """What scores: query_likelihood, classifier (with lora) or yes_no."""
    preset: str = "stable"
    """stable, or authors: the defaults of the published code."""
    collection: str | None = None
    """A BEIR folder, mini (embedded), or ir_datasets:ID."""
    split: str | None = None
    """Whose queries are trained on; by default train."""
    dev_split: str | None = "dev"
    """Whose queries decide which state is kept."""
    train_file: str | None = None
    """A file of groups with their own negatives, instead of the collection's training split."""
    run: str | None = None
    """Where negatives are taken from; by default BM25 on the collection."""
    dev_run: str | None = None
    """Candidates of the dev queries of --collection; by default BM25's."""
    train_queries: int | None = None
    """Train on a random sample of so many queries."""
    dev_queries: int = 100
    """Dev queries that are ranked at each evaluation."""
    dev_depth: int = 20
    """Their candidates."""
    negative_depth: int | None = None
    """Negatives are drawn from so many of the first candidates; by default 50."""
    seed: int = 0
    """Of samples, order and initialisation."""
    template: str | None = None
    """Name of a template or path of a YAML file; by default the method's, or qpeft_authors under that preset."""
    max_passage_tokens: int | None = None
    """Cut passages to this many tokens, in training and later."""
    teacher: str | None = None
    """A run whose scores are learned by margin_mse and plackett_luce; it must score every positive."""
    hint_queries: Literal["own", "shuffled"] = "own"
    """shuffled, a control: adapters read the next query in place of their own, in training and on dev."""
    resume: bool = False
    """Continue an interrupted training."""
    keep_every: int | None = None
    """Keep the adapter every so many steps, untrained and at the end, as folders OUTPUT.steps/step-000050 and so on."""
    report: bool = False
    """Write curves of loss and dev measure as a picture."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not Path(self.output).name:
            raise OptionError(f"--output {self.output}: it must name a folder to make")
        counts = ("train_queries", "dev_queries", "dev_depth", "negative_depth", "max_passage_tokens", "keep_every")
        at_least(1, **{name: getattr(self, name) for name in counts})
        if not 0 <= self.seed < 2**32:
            raise OptionError(f"--seed is {self.seed}; it must be from 0 to {2**32 - 1}")


def configs(arguments: Sequence[str]) -> tuple[type[Any], ...]:
    """Return this command's options, those of training, of the model and of the adapter."""
    preset = peek(arguments, "preset", Config.preset)
    if preset not in PRESETS:
        raise OptionError(f"unknown preset {preset!r}{nearest(preset, PRESETS)}")
    name = peek(arguments, "adapter", Config.adapter)
    module = adapters.load(name)
    method = _method(peek(arguments, "method", Config.method))
    own = (method.Trained,) if hasattr(method, "Trained") else ()
    if preset == "stable":
        kind = TrainingConfig if method.SCORES == "log_likelihood" else training_config.ReadOutTraining
        return Config, kind, ModelConfig, module.Config, *own
    if not hasattr(module, "Authors"):
        raise OptionError(f"--adapter {name} has no preset 'authors'")
    if method.SCORES != "log_likelihood":
        raise OptionError("--preset authors is for --method query_likelihood")
    return Config, training_config.Authors, ModelConfig, module.Authors


def _method(name: str) -> Any:
    module: Any = methods.load(name)
    if not hasattr(module, "SCORES"):
        trainable = [each for each in methods.available() if hasattr(methods.load(each), "SCORES")]
        raise OptionError(f"--method {name} has nothing to train; take one of {', '.join(trainable)}")
    return module


def run(config: Config, training: TrainingConfig, model: ModelConfig, adapter_config: Any, own: Any = None) -> None:
    """Train, keep the best state, write the adapter folder."""
    here = processes()
    config = _with_defaults(config, training)
    output = Path(config.output)
    checkpoints = output.with_name(output.name + ".checkpoints")
    begun = read_begun(output, checkpoints, resume=config.resume)
    collection = open_collection(config.collection) if config.collection else None
    groups, counts = read_training_groups(config, training, collection)
    dev = find_dev_candidates(config, collection)
    method = _method(config.method)
    template = load_template(config.template or ("qpeft_authors" if config.preset == "authors" else method.TEMPLATE))
    teacher = read_teacher(config, groups)

    import torch

    from qpeft.adapters._folder import base_identity, save_adapter
    from qpeft.training.contexts import contexts_bytes
    from qpeft.training.dev import DevRanking
    from qpeft.training.trainer import Collator, fit

    _check_loss(training, groups, method.SCORES, teacher is not None)
    lm, described = _open_lm(config, model, begun)
    opened = _build(config, template, adapter_config, own, lm)
    adapter = opened.adapter
    say_counts(counts)
    scorer = method.build_scorer(method.Config(**opened.method_options), lm, opened)
    _check_anchor(training, scorer)
    train_scorer = _scorer_of(config, scorer, [group.query for group in groups])
    dev_scorer = _scorer_of(config, scorer, [item.query for item in dev])
    facts = {
        **_facts(config, training, model, adapter_config, own),
        "collection": collection and {"name": collection.name, "fingerprint": collection.fingerprint()},
        "model": {**base_identity(lm), **described},
        "template": template.fingerprint,
    }
    if config.resume and not begun and output.exists():
        _check_finished(output, facts)
        return
    qrels = collection.qrels(config.dev_split) if collection and config.dev_split and dev else {}
    ranking = DevRanking(dev_scorer, dev, qrels, training.measure) if dev else None
    collator = Collator(train_scorer, training, config.seed, teacher)
    _keep_all_or_none(lm, adapter, lambda: contexts_bytes(lm, scorer.prompt, groups, training, dev))
    mark = {**facts, "dtype": lm.dtype, "threads": torch.get_num_threads(), "processes": here.count}
    save = functools.partial(
        save_adapter,
        name=opened.name,
        adapter=adapter,
        lm=lm,
        template=template,
        max_passage_tokens=config.max_passage_tokens,
        method=opened.method,
        method_options=opened.method_options,
    )
    with claim(checkpoints, mark):
        fitted = fit(
            train_scorer,
            adapter,
            groups,
            collator,
            training,
            checkpoints=checkpoints,
            seed=config.seed,
            dev=ranking,
            resume=config.resume,
            progress=sys.stderr.isatty(),
            callbacks=_keeping(config, mark, facts, save) if here.first else (),
        )
    if not here.first:
        return
    made = provenance(
        **facts,
        mining=dataclasses.asdict(counts),
        training={
            "queries": len(groups),
            "seconds": round(fitted.seconds, 1),
            "steps": fitted.steps,
            "processes": here.count,
            "trained_parameters": adapter.count_parameters(),
        },
        dev=ranking and {"measure": ranking.name, "queries": len(dev), "depth": config.dev_depth, **fitted.dev},
        history=fitted.history,
    )
    save(output, provenance=made)
    clear(checkpoints)
    if config.report:
        _draw(fitted, ranking.name if ranking else "", output)
    say(f"{output}: trained on {len(groups):,} queries in {fitted.seconds:,.0f} s, {fitted.steps:,} steps")
    if ranking:
        _say_dev(f"dev {ranking.name}, {len(dev)} queries × {config.dev_depth}", fitted.dev)


def _check_loss(training: TrainingConfig, groups: Sequence[Group], scores: Any, teacher: bool) -> None:
    from qpeft.losses import check_loss

    others = training.in_batch and min(training.batch_queries, len(groups)) > 1
    alone = not others and not (training.negatives and any(group.negatives for group in groups))
    check_loss(training.loss, teacher=teacher, scores=scores, alone=alone)


def _check_finished(output: Path, facts: Mapping[str, Any]) -> None:
    """Say that a training is finished, or raise StateError if what stands in its place is another one's adapter."""
    made = read_json(output / "provenance.json")
    of_made, of_facts = (
        {**{key: part.get(key) for key in WHAT_DECIDES}, "model": {"sha256": part.get("model", {}).get("sha256")}}
        for part in (made, facts)
    )
    check_same(output, of_made, of_facts)
    say(f"{output}: is finished")


def _with_defaults(config: Config, training: TrainingConfig) -> Config:
    """Return the options with those defaults that hang on others, or raise an error if one would have no effect."""
    if config.train_file is not None:
        for name in ("split", "run", "negative_depth"):
            if getattr(config, name) is not None:
                raise OptionError(f"--{name.replace('_', '-')}: --train-file has queries and negatives of its own")
    elif config.collection is None:
        raise OptionError("give --collection, or --train-file")
    else:
        config = dataclasses.replace(
            config,
            split=config.split or "train",
            negative_depth=50 if config.negative_depth is None else config.negative_depth,
        )
    dev = config.collection is not None and config.dev_split is not None
    for name, given in (("--dev-run", config.dev_run is not None), ("--patience", training.patience > 0)):
        if given and not dev:
            raise OptionError(f"{name} needs --collection and --dev-split: dev queries and judgements are theirs")
    if config.hint_queries != "own" and config.method != "query_likelihood":
        raise OptionError(f"--hint-queries {config.hint_queries} is for --method query_likelihood")
    if config.teacher is not None:
        _check_teacher(training)
    return config


def _check_teacher(training: TrainingConfig) -> None:
    from qpeft.losses import takes

    if not takes(training.loss, "teacher"):
        raise OptionError(f"--teacher: --loss {training.loss} has none; take margin_mse or plackett_luce")
    if training.in_batch:
        raise OptionError("--teacher: it has no scores for passages of other queries; give --in-batch false")


def _facts(config: Config, *others: Any) -> dict[str, Any]:
    """Return what provenance says of the options, and of the files that they name."""
    options = options_of(config, *others, without=("resume", "output", "report"))
    return {"command": "train", "options": options, "files": fingerprints(config)}


def _keeping(
    config: Config, mark: dict[str, Any], facts: Mapping[str, Any], save: Callable[..., None]
) -> Sequence[TrainerCallback]:
    """Return what keeps the adapter after so many steps, if that was asked for."""
    from qpeft.training.keep_steps import KeepSteps

    if config.keep_every is None:
        return ()
    output = Path(config.output)
    steps = output.with_name(output.name + ".steps")
    leave_mark(steps, mark, read_mark(steps) if (steps / BEGUN).exists() else {})

    def keep(step: int) -> None:
        save(steps / f"step-{step:06d}", provenance=provenance(**facts, training={"steps": step}))

    return (KeepSteps(config.keep_every, keep),)


def _draw(fitted: Any, measure: str, output: Path) -> None:
    from qpeft.analysis.plots import training_curves

    try:
        training_curves(fitted.history, measure, fitted.dev, output / "training.png")
    except InputError as error:
        say(f"  note: {error}")


def _say_dev(where: str, measured: Mapping[str, float | None]) -> None:
    found = {name.replace("_", "-"): value for name, value in measured.items() if value is not None}
    say(f"  {where}: {'  '.join(f'{name} {value:.4f}' for name, value in found.items())}")
    if found.get("trained", 1) <= max(found.get("zero-shot", 0), found.get("untrained", 0)):
        say("  note: on dev, training made it no better than it was, or than the model alone")


def _open_lm(config: Config, model: ModelConfig, begun: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Open the model with the number type and threads that the training began with; return what describes it too."""
    from qpeft.loading import load_lm

    def load(model: ModelConfig) -> Any:
        if model.passage_cache is None and not getattr(adapters.load(config.adapter), "CHANGES_LM", False):
            try:
                return load_lm(dataclasses.replace(model, passage_cache=4.0))
            except PassageCacheError as error:
                say(f"{error}; rows go through it whole")
        return load_lm(model)

    model = dataclasses.replace(model, device=processes().device(model.device))
    lm = open_as_begun(model, begun, load)
    if lm.has_encoder:
        raise OptionError("training needs a decoder-only model")
    return lm, lm.describe()


def _keep_all_or_none(lm: Any, adapter: Adapter, needed: Callable[[], int]) -> None:
    """Keep no contexts if they do not all fit; see `training.contexts`."""
    from qpeft.lm.context_store import ContextStore

    if adapter.changes_lm or lm.store is None or lm.store.folder is not None:
        return
    if (size := needed()) <= lm.store.capacity:
        return
    gib = [f"{some / 2**30:,.1f}" for some in (size, lm.store.capacity)]
    say(f"encoded contexts would take about {gib[0]} GiB, --passage-cache is {gib[1]}: they are encoded every time")
    lm.store = ContextStore(0)


def _check_anchor(training: TrainingConfig, scorer: Any) -> None:
    if training.anchor and not scorer.using(None).ready:
        raise OptionError("--anchor: with this --method, the model alone has no scores to hold on to")


def _build(config: Config, template: Template, adapter_config: Any, own: Any, lm: Any) -> AdapterFolder:
    """Return an untrained adapter, as if it had been opened."""
    import torch

    from qpeft.adapters._folder import AdapterFolder

    torch.manual_seed(config.seed)
    total = lm.model.num_parameters()
    adapter = adapters.build(config.adapter, adapter_config, lm)
    if getattr(methods.load(config.method), "HEAD", False):
        adapter.add_head(lm)
    parameters = adapter.count_parameters()
    say(f"{config.adapter}: {parameters:,} trained parameters, {100 * parameters / total:.2f} % of {lm.name}")
    options = {} if own is None else dataclasses.asdict(own)
    return AdapterFolder(
        config.adapter,
        adapter,
        template,
        config.max_passage_tokens,
        sha256="",
        method=config.method,
        method_options=options,
    )


def _scorer_of(config: Config, scorer: Any, queries: Sequence[Query]) -> Any:
    """Return what reads these queries, or raise the error that training would end in, before the work."""
    adapter: Adapter = scorer.adapter
    if config.hint_queries == "shuffled":
        if not adapter.hint_length(1):
            raise OptionError("--hint-queries: this adapter writes no hints")
        scorer = scorer.with_hint_queries(next_queries(queries))
    for query in queries:
        (row,) = scorer.rows(query, Passage("", ""))
        if adapter.reads_layer is not None and (row.hint or 0) < row.passage[0]:
            raise OptionError("an adapter that reads states of the passage needs its hint after the passage")
    return scorer
