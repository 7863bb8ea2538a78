"""Write results into docs/relevance-study.md: between its marks, from the files of results/ and nothing else.

    python recipes/relevance-study/table.py

What has no file is "not measured yet".
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
from cells import COLLECTIONS, EQUAL, LOSSES, RATES, Cell

from qpeft.analysis.study import Finding, Interval, Study
from qpeft.data.files import write_text
from qpeft.evaluation.significance import bootstrap_interval
from qpeft.evaluation.tables import interval, number

HERE = Path(__file__).parent
RESULTS, DOCS = HERE / "results", HERE.parents[1] / "docs" / "relevance-study.md"
MISSING = "not measured yet"
Answer = Callable[[Study], str]


def read(collection: str, method: str, study: str) -> Study | None:
    """Return a finished study, if there is one."""
    path = RESULTS / f"{collection}-{method}-{study}.json"
    return Study.from_dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


def signed(value: float, bounds: Interval) -> str:
    """Return a difference with its interval."""
    return number(value, 3, signed=True) + (f" [{interval(bounds, 3, signed=True)}]" if bounds else "")


def share(value: float | None, bounds: Interval) -> str:
    """Return a share in per cent with its interval, or that it is not defined."""
    if value is None or bounds is None:
        return "no share: the gain with both is not clear of 0"
    return f"{100 * value:.0f} % [{100 * bounds[0]:.0f} … {100 * bounds[1]:.0f}]".replace("-", "−")


def between(study: Study, one: str, other: str) -> str:
    """Return the difference of two lines, paired over queries."""
    pair = study.find(one), study.find(other)
    if pair[0] is None or pair[1] is None:
        return MISSING
    difference = np.subtract(pair[0].per_query, pair[1].per_query)
    return signed(float(difference.mean()), bootstrap_interval(difference))


def trained(modules: str, rank: int) -> Answer:
    """Return what a component trained alone reaches."""

    def answer(study: Study) -> str:
        found = study.find(f"trained: {modules}, rank {rank}")
        if found is None:
            return MISSING
        return (
            f"{number(found.mean, 3)} with {found.parameters:,} parameters; "
            f"of the gain {share(found.recovered, found.recovered_interval)}, "
            f"of the measure {share(found.share, found.share_interval)}"
        )

    return answer


def afterwards(study: Study) -> str:
    """Return what each component of adapters trained with both does alone."""
    found = [study.find(f"{name} of both") for name in ("attention", "mlp")]
    return "; ".join(
        f"{each.name.partition(' ')[0]} {signed(each.gain, each.gain_interval)}" for each in found if each is not None
    )


def whole(study: Study) -> str:
    """Return what all additions reach."""
    full = study.find(study.full)
    return MISSING if full is None else f"{number(full.mean, 3)}, gain {signed(full.gain, full.gain_interval)}"


def ordered(kind: str, of: Callable[[Finding], tuple[float, Interval]], count: int = 3) -> Answer:
    """Return the first lines of a question by some value."""

    def answer(study: Study) -> str:
        found = sorted(study.of(kind), key=lambda each: -of(each)[0])
        return "; ".join(f"{each.name} {signed(*of(each))}" for each in found[:count])

    return answer


def per_parameter(study: Study) -> str:
    """Return projections by what they gain alone per parameter."""
    found = sorted(study.of("one projection alone"), key=lambda each: -each.gain / each.parameters)
    return "; ".join(f"{each.name} {number(100_000 * each.gain / each.parameters, 3, signed=True)}" for each in found)


def every(kind: str) -> Answer:
    """Return all lines of a question."""

    def answer(study: Study) -> str:
        return "; ".join(
            f"{each.name}: {number(each.mean, 3)}, gain {signed(each.gain, each.gain_interval)}"
            for each in study.of(kind)
        )

    return answer


def gain(each: Finding) -> tuple[float, Interval]:
    """Return a gain and its interval."""
    return each.gain, each.gain_interval


def drop(each: Finding) -> tuple[float, Interval]:
    """Return a drop and its interval."""
    return each.drop or 0.0, each.drop_interval


QUESTIONS: tuple[tuple[str, str, str, Answer], ...] = (
    ("components", "LoRA on both components", "", whole),
    ("components", "LoRA on the MLP alone, rank 8", "up to 98 % of the performance with both", trained("mlp", 8)),
    ("components", f"the same, rank {EQUAL['mlp']}: the budget of both", "", trained("mlp", EQUAL["mlp"])),
    ("components", "LoRA on attention alone, rank 8", "helps more than the MLP (one summary)", trained("attention", 8)),
    ("components", f"the same, rank {EQUAL['attention']}: the budget of both", "",
     trained("attention", EQUAL["attention"])),
    ("components", "MLP − attention at one rank", "the two summaries contradict each other",
     lambda study: between(study, "trained: mlp, rank 8", "trained: attention, rank 8")),
    ("components", "MLP − attention at one budget", "",
     lambda study: between(
         study, f"trained: mlp, rank {EQUAL['mlp']}", f"trained: attention, rank {EQUAL['attention']}")),
    ("components", "gain of one component of adapters trained with both", "", afterwards),
    ("projections", "largest gains of one projection alone",
     "up and gate far before down; another summary: q and k", ordered("one projection alone", gain, 6)),
    ("projections", "the same per 100,000 parameters", "", per_parameter),
    ("projections", "largest drops without one projection", "", ordered("all but one projection", drop, 6)),
    ("layers", "largest drops without one layer", "layers 5–15 of 32; another summary: middle blocks",
     ordered("all but one layer", drop)),
    ("layers", "largest gains of one layer alone", "", ordered("one layer alone", gain)),
    ("layers", "lowest layers alone", "", every("from the bottom")),
    ("layers", "highest layers alone", "", every("from the top")),
    ("ranks", "ranks", "1, 2, 8 and 32 were compared", every("rank")),
    ("checkpoints", "steps", "a state at step 50 is named", every("step")),
)  # fmt: skip


def side_by_side(method: str) -> str:
    """Return the table of one method: what is said of the paper, and what is found."""
    lines = [["question", "said of the paper", *COLLECTIONS], ["---"] * (2 + len(COLLECTIONS))]
    for study, question, said, answer in QUESTIONS:
        cells = []
        for collection in COLLECTIONS:
            found = read(collection, method, study)
            cells.append(MISSING if found is None else answer(found) or MISSING)
        lines.append([question, said, *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def scope(method: str) -> str:
    """Return what the numbers of a method are of."""
    told = []
    for collection in COLLECTIONS:
        for study in ("components", "layers", "projections", "ranks", "checkpoints"):
            found = read(collection, method, study)
            if found is not None:
                told.append(
                    f"{study}, {found.collection}: {len(found.queries)} queries × {found.depth} candidates, "
                    f"{len(found.subjects)} adapters"
                )
    return "; ".join(told) + "." if told else f"{MISSING.capitalize()}."


def rates() -> str:
    """Return the learning rates that were tried on dev."""
    lines = [["method", "collection", "model alone", *(f"{rate:g}" for rate in RATES)], ["---"] * (3 + len(RATES))]
    for method in LOSSES:
        for collection in COLLECTIONS:
            alone, values = "–", []
            for rate in RATES:
                path = RESULTS / "training" / f"{Cell(collection, method, rate=rate).name}.json"
                if not path.is_file():
                    values.append(MISSING)
                    continue
                dev = json.loads(path.read_text(encoding="utf-8"))["dev"]
                alone = number(dev["zero_shot"], 4)
                values.append(number(dev["trained"], 4))
            lines.append([method, collection, alone, *values])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Fill the marks of the page."""
    text = DOCS.read_text(encoding="utf-8")
    parts = {"rates": rates()}
    for method in LOSSES:
        parts |= {method: side_by_side(method), f"{method} scope": scope(method)}
    for name, part in parts.items():
        mark = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not mark.search(text):
            raise SystemExit(f"{DOCS} has no mark {name!r}")
        text = mark.sub(lambda found, part=part: f"{found[1]}{part}\n{found[2]}", text)
    with write_text(DOCS) as file:
        file.write(text)


if __name__ == "__main__":
    main()
