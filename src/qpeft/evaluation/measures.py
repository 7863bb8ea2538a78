"""Effectiveness measures of a run, by their usual notation: `nDCG@10`, `RR@10`, `P(rel=2)@5`, `CandR@10`.

Everything but the candidate measures is computed by ir_measures, which asks trec_eval where it can.
"""

from __future__ import annotations

import ast
import math
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ir_measures
from ir_measures.measures import registry

from qpeft.errors import InputError, OptionError, nearest
from qpeft.evaluation.candidate_measures import CANDIDATE_MEASURES, CandidateMeasure
from qpeft.types import Qrels, Run

Measure = ir_measures.Measure

_SEPARATED = re.compile(r"[^\s,(]+(?:\([^)]*\)?[^\s,]*)?")
_NOTATION = re.compile(r"(?P<name>[^\W\d]\w*)(?:\((?P<params>.*)\))?(?:@(?P<at>\d+(?:\.\d+)?))?")


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What `evaluate` found for one run.

    Attributes:
        run: tag of the run.
        measures: canonical notation of the measures, in the order asked for.
        queries: ids of all judged queries, in the order of the qrels.
        unranked: those of them that the run does not rank; they score 0.
        per_query: measure → query id → value. A clean candidate measure has no value for some queries.
    """

    run: str
    measures: tuple[str, ...]
    queries: tuple[str, ...]
    unranked: frozenset[str]
    per_query: Mapping[str, Mapping[str, float]]

    @property
    def means(self) -> dict[str, float | None]:
        """Arithmetic mean of each measure over its queries (also of counts such as `NumRet`); None over no query."""
        return {
            measure: math.fsum(values.values()) / len(values) if values else None
            for measure, values in self.per_query.items()
        }

    def mean_of_ranked(self, measure: str) -> float | None:
        """Arithmetic mean of a measure over the queries that the run ranks; None if there is none."""
        found = self.per_query.get(measure, {})
        values = [value for query_id, value in found.items() if query_id not in self.unranked]
        return math.fsum(values) / len(values) if values else None


def parse_measures(notation: str | Sequence[str]) -> tuple[Measure, ...]:
    """Read measures in ir_measures' notation, separated by spaces or commas, or its own, and drop repetitions.

    Besides ir_measures' own, `CandR@k`, `CandHit@k`, `CandR_clean@k` and `CandHit_clean@k` are known
    (`qpeft.evaluation.candidate_measures`).

    Raises:
        OptionError: a name, parameter or value that is not known, a missing cutoff, or a measure that no installed
            package computes.
    """
    text = notation if isinstance(notation, str) else " ".join(map(str, notation))
    measures = {str(measure): measure for measure in map(_parse, _SEPARATED.findall(text))}
    if not measures:
        raise OptionError("no measure is given; write them as in 'nDCG@10 RR@10 R@100'")
    return tuple(measures.values())


def evaluate(run: Run, qrels: Qrels, measures: str | Sequence[str]) -> Evaluation:
    """Evaluate a run per query and on average.

    All queries of `qrels` count, and no others: a judged query that the run does not rank scores 0, as with
    `trec_eval -c`; a ranked query without judgements is ignored. So do the clean candidate measures: they leave out
    queries whose candidates hold nothing relevant, and none that the run skips, unless nothing is relevant for it.

    Args:
        run: what is evaluated is the order of its rankings; for those made by `Ranking.from_scores` this is the
            order that trec_eval reads from their scores, ties included.
        qrels: the judgements, or labels made by `judge`.
        measures: see `parse_measures`.

    Raises:
        InputError: `qrels` judges no query, or none that the run ranks; an empty run scores 0.
        OptionError: see `parse_measures`; or the program behind a measure failed.
    """
    if not qrels:
        raise InputError("there are no judged queries to evaluate on")
    if len(run) and not any(query_id in run for query_id in qrels):
        first, judged = next(iter(run)), next(iter(qrels))
        raise InputError(f"run {run.tag!r} ranks {first!r} and others, but no judged query, such as {judged!r}")
    parsed = parse_measures(measures)
    values: dict[str, dict[str, float]] = {str(measure): {} for measure in parsed}
    candidate_based = [measure for measure in parsed if isinstance(measure, CandidateMeasure)]
    for query_id, grades in qrels.items():
        ranked = [grades.get(hit.passage_id, 0) for hit in run[query_id].hits] if query_id in run else []
        for measure in candidate_based:
            skipped = query_id not in run and any(grade >= measure["rel"] for grade in grades.values())
            value = 0.0 if skipped else measure.value(ranked)
            if value is not None:
                values[str(measure)][query_id] = value
    others = [measure for measure in parsed if not isinstance(measure, CandidateMeasure)]
    if others:
        for name, query_id, number in _ir_measures_values(run, qrels, others):
            values[name][query_id] = number
    return Evaluation(
        run=run.tag,
        measures=tuple(values),
        queries=tuple(qrels),
        unranked=frozenset(query_id for query_id in qrels if query_id not in run),
        per_query=values,
    )


def _parse(word: str) -> Measure:
    match = _NOTATION.fullmatch(word)
    if match is None:
        raise OptionError(f"measure {word!r} cannot be read; write it like nDCG@10 or P(rel=2)@5")
    kind = _kind(match["name"])
    params = _params(word, match["params"] or "")
    if match["at"] is not None:
        params[kind.AT_PARAM] = float(match["at"]) if "." in match["at"] else int(match["at"])
    for name, value in params.items():
        if name not in kind.SUPPORTED_PARAMS:
            raise OptionError(f"measure {word!r} has no parameter {name!r}{nearest(name, kind.SUPPORTED_PARAMS)}")
        # the C code of trec_eval crashes on a cutoff of 0
        if name in ("cutoff", "depth") and (type(value) is not int or value < 1):
            raise OptionError(f"measure {word!r}: {name} is {value!r}; it must be a whole number of at least 1")
    for name, info in kind.SUPPORTED_PARAMS.items():
        if info.required and name not in params:
            raise OptionError(f"measure {word!r} needs its {name}: {word}@…")
        if name in params and not info.validate(params[name]):
            raise OptionError(f"measure {word!r}: {name} cannot be {params[name]!r}")
    return _computable(word, kind(**params))


def least_relevant(notation: str) -> int:
    """Return the grade from which a measure takes a passage for relevant; 1 if it has none of its own."""
    (measure,) = parse_measures(notation)
    return int(measure["rel"]) if "rel" in type(measure).SUPPORTED_PARAMS else 1


def _kind(name: str) -> Any:
    known: dict[str, Any] = {**registry, **CANDIDATE_MEASURES}
    if name in known:
        return known[name]
    other_case = [spelling for spelling in known if spelling.lower() == name.lower()]
    hint = f"; did you mean {other_case[0]!r}?" if other_case else nearest(name, known)
    raise OptionError(f"measure {name!r} is not known{hint}")


def _params(word: str, text: str) -> dict[str, Any]:
    try:
        call = ast.parse(f"dict({text})", mode="eval").body
        if isinstance(call, ast.Call) and not call.args:
            return {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError):
        pass
    raise OptionError(f"measure {word!r}: parameters are written as name=value, as in P(rel=2)@5")


def _computable(word: str, measure: Measure) -> Measure:
    pipeline: Any = ir_measures.DefaultPipeline  # not annotated
    if isinstance(measure, CandidateMeasure) or pipeline.supports(measure):
        return measure
    sources = [source for source in pipeline.providers if source.supports(measure)]
    commands = ", or ".join(str(source.install_instructions() or source.NAME) for source in sources)
    raise OptionError(f"measure {word!r} is known, but nothing installed computes it" + f": {commands}" * bool(sources))


def _ir_measures_values(run: Run, qrels: Qrels, measures: Sequence[Measure]) -> Iterator[tuple[str, str, float]]:
    """Yield (measure, query id, value) for every measure and judged query.

    Ranks are handed over as descending scores, so that every program behind ir_measures evaluates our order,
    whatever it does about ties; and numbers as query ids, because gdeval refuses others.
    """
    numbers = {query_id: str(number) for number, query_id in enumerate(qrels, start=1)}
    judged = {
        numbers[query_id]: {passage_id: int(grade) for passage_id, grade in grades.items()}
        for query_id, grades in qrels.items()
    }
    ranked = {
        numbers[query_id]: {hit.passage_id: float(-rank) for rank, hit in enumerate(run[query_id].hits)}
        for query_id in qrels
        if query_id in run
    }
    try:
        found = {
            (str(metric.measure), metric.query_id): float(metric.value)
            for metric in ir_measures.iter_calc(measures, judged, ranked)
        }
    except (ValueError, RuntimeError, subprocess.CalledProcessError) as error:
        raise OptionError(f"{', '.join(map(str, measures))}: {error}") from error
    for measure in measures:
        for query_id, number in numbers.items():
            yield str(measure), query_id, found.get((str(measure), number), float(measure.DEFAULT))
