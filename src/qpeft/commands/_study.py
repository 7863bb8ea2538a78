"""What the studies of `analyze` share: options, adapters, candidates, and results that an interruption leaves whole."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qpeft import methods
from qpeft.commands._progress import progress_bar
from qpeft.commands._same_work import is_finished
from qpeft.commands._sample import sample_run
from qpeft.commands._unfinished import Unfinished, open_as_begun
from qpeft.data.candidates import candidates_from_run, check_run
from qpeft.data.collection import identity, open_collection
from qpeft.data.records import read_json
from qpeft.data.trec import read_run
from qpeft.errors import InputError, OptionError, StateError
from qpeft.model_config import ModelConfig
from qpeft.provenance import fingerprint, input_fingerprint, options_of, provenance
from qpeft.types import Candidates, Qrels, Ranking, Run

if TYPE_CHECKING:  # so that options can be listed without importing torch
    from qpeft.analysis.study import Design, Subject

UNFINISHED, RESULT = "unfinished.jsonl", "study.json"


@dataclass(frozen=True)
class StudyConfig:
    """Study."""

    adapter: tuple[str, ...]
    """Folder of a LoRA adapter; may be given several times."""
    collection: str
    """A BEIR folder, mini (embedded), or ir_datasets:ID."""
    run: str
    """The first stage's run, whose candidates are ranked."""
    output: str
    """The folder to write."""
    split: str = "test"
    """Whose queries and judgements."""
    depth: int = 20
    """Candidates of a query."""
    limit_queries: int | None = None
    """Rank a random sample of this many queries only."""
    seed: int = 0
    """Of the sample."""
    measure: str = "nDCG@10"
    """What is compared."""
    resume: bool = False
    """Continue an interrupted study; do nothing if it is finished."""


def unfinished_in(folder: Path, resume: bool) -> Unfinished:
    """Return the unfinished file of a study in its folder.

    Raises:
        StateError: an unfinished study stands there and `resume` was not given; or the folder holds something else.
    """
    found = Unfinished(folder / UNFINISHED, "study", resume)
    if found.path.exists() or (folder / RESULT).is_file() or not folder.exists():
        return found
    if not folder.is_dir() or any(folder.iterdir()):
        raise StateError(f"{folder} exists and is no folder of a study")
    return found


def run_study(
    config: StudyConfig, model: ModelConfig, folders: Sequence[str], design_of: Callable[[Sequence[Subject]], Design]
) -> None:
    """Rank under every ablation, and write results, figures, report and summary.

    Args:
        config: options.
        model: of the model.
        folders: of the adapters.
        design_of: says from the adapters what is measured.
    """
    from qpeft.evaluation.measures import parse_measures

    measures = parse_measures(config.measure)
    if len(measures) > 1:
        raise OptionError(f"--measure {config.measure!r}: one measure is compared, not {len(measures)}")
    if "_clean" in (name := str(measures[0])):
        raise OptionError(f"--measure {name}: not every query has a value; take {name.replace('_clean', '')}")
    output = Path(config.output)
    unfinished = unfinished_in(output, config.resume)
    collection = open_collection(config.collection)
    queries, qrels = collection.queries(config.split), collection.qrels(config.split)
    first = sample_run(_judged(read_run(config.run), qrels, config), config.limit_queries, config.seed, config.depth)
    check_run(first, queries, collection.passages, config.depth)

    import torch

    from qpeft.analysis.study import Study, findings
    from qpeft.analysis.study_report import write_study

    lm = open_as_begun(model, unfinished.settings)
    subjects = [_subject(folder, lm) for folder in folders]
    design = design_of(subjects)
    facts: dict[str, Any] = {
        "command": f"analyze {design.study}",
        "options": options_of(config, model),
        "collection": identity(collection, config.split),
        "first_stage": {"tag": first.tag, "sha256": input_fingerprint(config.run)},
        "adapters": [
            {
                "folder": each.folder,
                "sha256": each.sha256,
                "method": each.method,
                "sets": len(_sets(design, subjects, i)),
            }
            for i, each in enumerate(subjects)
        ],
        "model": lm.describe(),
    }
    result = output / RESULT
    before = read_json(result) if config.resume and result.is_file() else None
    made = before.get("made") if isinstance(before, dict) else None
    if not unfinished.settings and is_finished(made, facts):
        print(f"{output}: finished before, with the same options, data and adapters", file=sys.stderr)
        return
    settings = {"dtype": lm.dtype, "threads": torch.get_num_threads()}
    unfinished.open(facts, settings)
    lines = unfinished.lines
    items = list(candidates_from_run(first, queries, collection.passages, config.depth))
    work: dict[str, Any] = {"layers_run": 0, "layers_without_sharing": 0, "why_not": ""}
    with closing(unfinished), progress_bar(design.study, len(subjects) * len(items), len(lines)) as bar:
        for line in _rank(lm, subjects, design, items, len(lines)):
            lines.append(line)
            unfinished.add(line)
            bar.advance(pairs=sum(len(scores) for scores in line["scores"]))
    for line in lines:
        work["layers_run"] += line["work"][0]
        work["layers_without_sharing"] += line["work"][1]
        work["why_not"] = line["why_not"] or work["why_not"]
    judged = {item.query.id: qrels[item.query.id] for item in items}
    values = _values(design, subjects, items, lines, judged, config.measure)
    study = Study(
        study=design.study,
        measure=str(measures[0]),
        collection=f"{collection.name} · {config.split}",
        depth=config.depth,
        queries=tuple(judged),
        subjects=tuple(_described(each) for each in subjects),
        findings=findings(design, subjects, values),
        full=design.full.ablation.name,
        work=work,
        made=provenance(**facts),
    )
    write_study(study, output)
    unfinished.remove()
    print(f"{output}: {len(study.findings)} lines, {len(items):,} queries, {len(subjects)} adapters", file=sys.stderr)


def _judged(first: Run, qrels: Qrels, config: StudyConfig) -> Run:
    judged = Run((ranking for query_id, ranking in first.items() if query_id in qrels), first.tag)
    if not judged:
        raise InputError(
            f"{config.run}: none of its queries is judged in split {config.split!r} of {config.collection}"
        )
    return judged


def _subject(folder: str, lm: Any) -> Subject:
    from qpeft.adapters._folder import load_adapter
    from qpeft.adapters._lora import LoraAdapter
    from qpeft.analysis.study import Subject

    opened = load_adapter(folder, lm)
    adapter = opened.adapter
    if not isinstance(adapter, LoraAdapter):
        raise OptionError(f"--adapter {folder}: {opened.name} has no additions to layers; studies are of LoRA")
    places = adapter.places()
    read = {
        "method": [opened.method, dict(opened.method_options)],
        "template": opened.template.fingerprint,
        "max_passage_tokens": opened.max_passage_tokens,
    }
    scales = tuple(adapter.scales().values())
    adapter.withdraw()
    step = re.fullmatch(r"step-(\d+)", Path(folder).name)
    made = Path(folder) / "provenance.json"
    told = read_json(made) if made.is_file() else {}
    options = told.get("options", {}) if isinstance(told, dict) else {}
    return Subject(
        folder,
        opened.sha256,
        adapter.config.r,
        options.get("seed"),
        places,
        step=int(step[1]) if step else None,
        scales=scales,
        method=opened.method,
        loss=options.get("loss"),
        prompt=fingerprint(read),
        only_additions=adapter.count_parameters() == sum(places.values()),
    )


def _sets(design: Design, subjects: Sequence[Subject], index: int) -> list[Any]:
    """Return the sets of additions that are ranked with; none at all only where no earlier adapter stands for it."""
    from qpeft.analysis.study import bases

    return [active for active in design.sets(index) if active or bases(design, subjects)[index] == index]


def _rank(
    lm: Any,
    subjects: Sequence[Subject],
    design: Design,
    items: Sequence[Candidates],
    done: int,
) -> Iterator[dict[str, Any]]:
    """Yield one entry per adapter and query, from where an earlier process stopped."""
    from qpeft.adapters._folder import load_adapter
    from qpeft.analysis.ablated import Ablated
    from qpeft.pointwise import Pointwise

    for index, subject in enumerate(subjects):
        rest = items[max(0, done - index * len(items)) :]
        if not rest:
            continue
        opened: Any = load_adapter(subject.folder, lm)
        scorer = methods.open_scorer(lm, opened)
        for item in items:
            scorer.check(item.query)
        sets = _sets(design, subjects, index)
        ablated = Ablated(lm, opened.adapter, Pointwise(scorer), sets)
        before = (0, 0)
        for item in rest:
            found = ablated.rank([item])
            work = ablated.work
            yield {
                "adapter": index,
                "query": item.query.id,
                "scores": [_scores(found[active][0], item) for active in sets],
                "work": [now - then for now, then in zip(work, before, strict=True)],
                "why_not": ablated.why_not,
            }
            before = work
        opened.adapter.withdraw()


def _scores(ranking: Ranking, item: Candidates) -> list[float]:
    by_id = {hit.passage_id: hit.score for hit in ranking.hits}
    return [by_id[passage.id] for passage in item.passages]


def _values(
    design: Design,
    subjects: Sequence[Subject],
    items: Sequence[Candidates],
    lines: Sequence[dict[str, Any]],
    qrels: Qrels,
    measure: str,
) -> dict[Any, Any]:
    """Return the measure of each query by adapter and active additions."""
    import numpy as np

    from qpeft.analysis.study import bases
    from qpeft.evaluation.measures import evaluate

    values = {}
    for index in range(len(subjects)):
        own = [line for line in lines if line["adapter"] == index]
        for place, active in enumerate(_sets(design, subjects, index)):
            rankings = [
                Ranking.from_scores(
                    item.query.id, zip((p.id for p in item.passages), line["scores"][place], strict=True)
                )
                for item, line in zip(items, own, strict=True)
            ]
            ((_, of_queries),) = evaluate(Run(rankings, "ablation"), qrels, measure).per_query.items()
            values[index, active] = np.array([of_queries[item.query.id] for item in items])
    for index, base in bases(design, subjects).items():
        values[index, frozenset()] = values[base, frozenset()]
    return values


def _described(subject: Subject) -> dict[str, Any]:
    return {
        "folder": subject.folder,
        "sha256": subject.sha256,
        "rank": subject.rank,
        "method": subject.method,
        "loss": subject.loss,
        "seed": subject.seed,
        "step": subject.step,
        "component": subject.component,
        "parameters": subject.parameters,
    }
