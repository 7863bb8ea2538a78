"""Train an adapter: a small module that writes into the input of the frozen language model, or LoRA in its layers.

Takes a collection with judgements (negatives are mined with BM25, or taken from --run) or a file of groups
(--train-file, JSON Lines as of FlagEmbedding or Tevatron, or DPR's JSON). The best state by a dev ranking is kept.
After an interruption, --resume continues at the last checkpoint, and the result is the same.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import random
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qpeft import adapters, methods
from qpeft.commands._peek import peek
from qpeft.data.candidates import candidates_from_run
from qpeft.data.collection import Collection, open_collection
from qpeft.data.trec import read_run
from qpeft.errors import OptionError, StateError, nearest
from qpeft.model_config import ModelConfig
from qpeft.provenance import file_fingerprint, fingerprint, provenance
from qpeft.retrieval.bm25 import BM25
from qpeft.template import Prompt, Template, load_template
from qpeft.training import config as training_config
from qpeft.training.config import TrainingConfig
from qpeft.training.groups import MiningCounts, groups_from_collection, groups_from_jsonl
from qpeft.types import Candidates, Group, Passage, Query, Run

if TYPE_CHECKING:  # so that options can be listed without importing torch
    from qpeft.adapters._folder import AdapterFolder
    from qpeft.hints import HintWriter

PRESETS = ("stable", "authors")
BEGUN = "begun.json"


@dataclass(frozen=True)
class Config:
    """Data and output."""

    output: str
    """The adapter folder to write."""
    adapter: str = "qpeft_a"
    """What is trained; its own options are listed below."""
    method: str = "query_likelihood"
    """What scores: query_likelihood, classifier (with lora) or yes_no."""
    preset: str = "stable"
    """stable, or authors: the defaults of the published code."""
    collection: str | None = None
    """A BEIR folder, mini (embedded), or ir_datasets:ID."""
    split: str = "train"
    """Whose queries are trained on."""
    dev_split: str | None = "dev"
    """Whose queries decide which state is kept."""
    train_file: str | None = None
    """A file of groups, instead of the collection's training split."""
    run: str | None = None
    """Where negatives are taken from; by default BM25 on the collection."""
    dev_run: str | None = None
    """Candidates of the dev queries; by default BM25 on the collection."""
    train_queries: int | None = None
    """Train on a random sample of so many queries."""
    dev_queries: int = 100
    """Dev queries that are ranked at each evaluation."""
    dev_depth: int = 20
    """Their candidates."""
    negative_depth: int = 50
    """Negatives are drawn from so many of the first candidates."""
    seed: int = 0
    """Of samples, order and initialisation."""
    template: str | None = None
    """Name of a template or path of a YAML file; by default the method's, or qpeft_authors under that preset."""
    max_passage_tokens: int | None = None
    """Cut passages to this many tokens, in training and later."""
    teacher: str | None = None
    """A run whose scores are learned by margin_mse and plackett_luce."""
    resume: bool = False
    """Continue an interrupted training."""
    keep_every: int | None = None
    """Keep the adapter every so many steps, and untrained, as folders OUTPUT.steps/step-000050 and so on."""
    report: bool = False
    """Write curves of loss and dev measure as a picture."""

    def __post_init__(self) -> None:
        for name in ("train_queries", "dev_queries", "dev_depth", "negative_depth", "max_passage_tokens", "keep_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise OptionError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")


def configs(arguments: Sequence[str]) -> tuple[type[Any], ...]:
    """Return this command's options, those of training, of the model and of the adapter."""
    preset = peek(arguments, "preset", Config.preset)
    if preset not in PRESETS:
        raise OptionError(f"unknown preset {preset!r}{nearest(preset, PRESETS)}")
    module = adapters.load(peek(arguments, "adapter", Config.adapter))
    method = _method(peek(arguments, "method", Config.method))
    own = (method.Trained,) if hasattr(method, "Trained") else ()
    if preset == "stable":
        kind = TrainingConfig if method.SCORES == "log_likelihood" else training_config.ReadOut
        return Config, kind, ModelConfig, module.Config, *own
    if not hasattr(module, "Authors"):
        raise OptionError(f"adapter {module.__name__.rpartition('.')[2]!r} has no preset 'authors'")
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
    output = Path(config.output)
    checkpoints = output.with_name(output.name + ".checkpoints")
    begun = _begun(output, checkpoints, config)
    collection = open_collection(config.collection) if config.collection else None
    if collection is None and config.train_file is None:
        raise OptionError("give --collection, or --train-file")
    groups, counts = _groups(config, training, collection)
    dev = _dev_candidates(config, collection)
    method = _method(config.method)
    template = load_template(config.template or ("qpeft_authors" if config.preset == "authors" else method.TEMPLATE))
    teacher = _teacher(config)

    import torch

    from qpeft.adapters._folder import base_identity, save_adapter
    from qpeft.losses import check_loss
    from qpeft.training.dev import DevRanking
    from qpeft.training.trainer import Collator, KeepSteps, fit

    check_loss(training.loss, teacher=teacher is not None, scores=method.SCORES)
    lm = _open_lm(config, model, begun)
    opened = _build(config, template, adapter_config, own, lm)
    adapter = opened.adapter
    _say_counts(counts)
    scorer = method.build_scorer(method.Config(**opened.method_options), lm, opened)
    if training.anchor and not scorer.using(None).ready:
        raise OptionError(f"--anchor: with --method {config.method}, the model alone has no scores to hold on to")
    facts = {
        "command": "train",
        "options": {
            name: value
            for part in (config, training, model, adapter_config, own)
            if part is not None
            for name, value in dataclasses.asdict(part).items()
            if name not in ("resume", "output", "report")
        },
        "collection": collection and {"name": collection.name, "fingerprint": collection.fingerprint()},
        "files": {
            name: file_fingerprint(Path(path))
            for name in ("train_file", "run", "dev_run", "teacher")
            if (path := getattr(config, name)) is not None
        },
        "model": {**base_identity(lm), "dtype": lm.dtype},
        "template": template.fingerprint,
    }
    qrels = collection.qrels(config.dev_split) if collection and config.dev_split and dev else {}
    ranking = DevRanking(lm, scorer.prompt, dev, qrels, training.measure, scorer=scorer) if dev else None
    collator = Collator(scorer.prompt, training, config.seed, teacher)
    _check_queries(scorer.prompt, adapter, [*(group.query for group in groups), *(item.query for item in dev)])
    mark = {"options": fingerprint(facts), "dtype": lm.dtype, "threads": torch.get_num_threads()}
    _claim(checkpoints, mark, begun)
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
    keeping = []
    if config.keep_every is not None:
        steps = output.with_name(output.name + ".steps")
        _claim(steps, mark, _mark(steps) if steps.exists() else {})

        def keep(step: int) -> None:
            save(steps / f"step-{step:06d}", provenance=provenance(**facts, training={"steps": step}))

        keeping = [KeepSteps(config.keep_every, keep)]
    fitted = fit(
        lm,
        adapter,
        groups,
        collator,
        training,
        checkpoints=checkpoints,
        seed=config.seed,
        dev=ranking,
        resume=config.resume,
        progress=sys.stderr.isatty(),
        callbacks=keeping,
        scorer=scorer,
    )
    made = provenance(
        **facts,
        mining=dataclasses.asdict(counts),
        training={
            "queries": len(groups),
            "seconds": round(fitted.seconds, 1),
            "steps": fitted.steps,
            "trained_parameters": adapter.count_parameters(),
        },
        dev=ranking and {"measure": ranking.name, "queries": len(dev), "depth": config.dev_depth, **fitted.dev},
        history=fitted.history,
    )
    save(output, provenance=made)
    if config.report:
        from qpeft.analysis.plots import training_curves

        training_curves(fitted.history, ranking.name if ranking else "", fitted.dev, output / "training.png")
    shutil.rmtree(checkpoints, ignore_errors=True)
    _say(f"{output}: trained on {len(groups):,} queries in {fitted.seconds:,.0f} s, {fitted.steps:,} steps")
    if ranking:
        _say(f"  dev {ranking.name}, {len(dev)} queries × {config.dev_depth}: {_values(fitted.dev)}")


def _values(measured: Mapping[str, float | None]) -> str:
    named = ((name.replace("_", "-"), value) for name, value in measured.items() if value is not None)
    return "  ".join(f"{name} {value:.4f}" for name, value in named)


def _open_lm(config: Config, model: ModelConfig, begun: Mapping[str, Any]) -> Any:
    """Open the model with the number type and threads that the training began with."""
    import torch

    from qpeft.loading import load_lm

    if not model.passage_cache and not getattr(adapters.load(config.adapter), "CHANGES_LM", False):
        model = dataclasses.replace(model, passage_cache=4.0)
    torch.set_num_threads(begun.get("threads", torch.get_num_threads()))  # the size of batches follows it
    lm: Any = load_lm(dataclasses.replace(model, dtype=begun.get("dtype", model.dtype)))
    # As in reranking: the last bits depend on the number type, which may be chosen by measurement, and on the threads.
    torch.set_num_threads(begun.get("threads", torch.get_num_threads()))
    if lm.has_encoder:
        raise OptionError("training needs a decoder-only model")
    return lm


def _build(config: Config, template: Template, adapter_config: Any, own: Any, lm: Any) -> AdapterFolder:
    """Return an untrained adapter, as if it had been opened."""
    import torch

    from qpeft.adapters._folder import AdapterFolder

    torch.manual_seed(config.seed)
    total = sum(p.numel() for p in lm.model.parameters())
    adapter = adapters.load(config.adapter).build(adapter_config, lm)
    if getattr(methods.load(config.method), "HEAD", False):
        adapter.add_head(lm)
    parameters = adapter.count_parameters()
    _say(f"{config.adapter}: {parameters:,} trained parameters, {100 * parameters / total:.2f} % of {lm.name}")
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


def _begun(output: Path, checkpoints: Path, config: Config) -> dict[str, Any]:
    """Return what an unfinished training left of its options, number type and threads; nothing if there is none."""
    if output.exists() and not (output / "adapter_config.json").is_file():
        raise StateError(f"{output} exists and is no adapter folder")
    if not any(checkpoints.glob("checkpoint-*")):
        return {}
    if not config.resume:
        raise StateError(
            f"{checkpoints} is an unfinished training: continue it with --resume, or delete it to start afresh"
        )
    return _mark(checkpoints)


def _mark(folder: Path) -> dict[str, Any]:
    """Return the options, number type and threads of the training that a folder is of."""
    try:
        found: dict[str, Any] = json.loads((folder / BEGUN).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StateError(f"{folder} cannot be continued: {BEGUN} is not readable; delete it") from error
    return found


def _claim(checkpoints: Path, mark: dict[str, Any], begun: dict[str, Any]) -> None:
    """Leave a mark beside the checkpoints, or compare with the one that is there."""
    if begun and begun != mark:
        raise StateError(f"{checkpoints} was made with other options, data or model; delete it to start afresh")
    checkpoints.mkdir(parents=True, exist_ok=True)
    (checkpoints / BEGUN).write_text(json.dumps(mark) + "\n", encoding="utf-8")


def _check_queries(prompt: Prompt, adapter: HintWriter, queries: Sequence[Query]) -> None:
    """Raise the error that training would end in, so that it shows before the work and not in its midst."""
    for query in queries:
        (row,) = prompt.rows(query, Passage("", ""))
        if adapter.reads_layer is not None and (row.hint or 0) < row.passage[0]:
            raise OptionError("an adapter that reads states of the passage needs its hint after the passage")


def _groups(
    config: Config, training: TrainingConfig, collection: Collection | None
) -> tuple[list[Group], MiningCounts]:
    if config.train_file is None:
        assert collection is not None
        return groups_from_collection(
            collection,
            config.split,
            negatives=training.negatives,
            seed=config.seed,
            queries=config.train_queries,
            run=read_run(config.run) if config.run else None,
            depth=config.negative_depth,
        )
    groups, counts = groups_from_jsonl(config.train_file)
    if config.train_queries is not None and config.train_queries < len(groups):
        groups = random.Random(config.seed).sample(groups, config.train_queries)
    return groups, counts


def _dev_candidates(config: Config, collection: Collection | None) -> list[Candidates]:
    """Return the dev queries with their candidates, those first of a seeded order that have a relevant one."""
    if collection is None or config.dev_split is None:
        return []
    queries, qrels = collection.queries(config.dev_split), collection.qrels(config.dev_split)
    if config.dev_run:
        run = read_run(config.dev_run)
    else:
        ordered = sorted(queries)
        random.Random(config.seed).shuffle(ordered)
        chosen = [queries[query_id] for query_id in ordered[: 2 * config.dev_queries]]
        index = BM25(collection.passages.values())
        run = Run(index.retrieve(chosen, config.dev_depth), "bm25")
    found = [
        item
        for item in candidates_from_run(run, queries, collection.passages, config.dev_depth)
        if any(qrels[item.query.id].get(passage.id, 0) > 0 for passage in item.passages)
    ]
    return found[: config.dev_queries]


def _teacher(config: Config) -> dict[tuple[str, str], float] | None:
    if config.teacher is None:
        return None
    return {
        (ranking.query_id, hit.passage_id): hit.score
        for ranking in read_run(config.teacher).values()
        for hit in ranking.hits
    }


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _say_counts(counts: MiningCounts) -> None:
    notes = {
        "queries have no positive passage and were left out": counts.without_positive,
        "queries have no negatives of their own": counts.without_negative,
        "candidates hold an answer and were not taken as negatives": counts.dropped_as_answer,
        "negatives say the same as a positive and were dropped": counts.dropped_as_positive,
    }
    for what, count in notes.items():
        if count:
            _say(f"  note: {count:,} {what}")
