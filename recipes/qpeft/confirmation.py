"""The confirmation: what the table suggests, tested on test queries that its own sample does not hold.

A few of them had been ranked before, in the earlier trial's sample. The tests, which were fixed before, are of all, and
stand beside the same ones without these few.
"""

from __future__ import annotations

import collections
import json
import statistics
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from qpeft.evaluation.significance import bootstrap_interval, holm, paired_t

HOME = "reddit-shift"
MEASURES = ("nDCG@10", "RR@10", "R@10", "CandR@10", "CandR_clean@10", "CandHit@10", "CandHit_clean@10")
BASELINES = ("zero_shot", "soft_prompt")
TESTED = ("qpeft_a", "qpeft_r")
LORA = "lora_r4"
MORE = 1280
"""Training queries."""
KINDS = {"per_query": "", "mixed": ", both half BM25"}


def of_more(row: str) -> str:
    """Return the name here of a row that was trained on more queries."""
    return f"{row}, {MORE:,} queries"


ROWS = {
    **{row: f"{HOME}-320-{row}-seed" for row in ("soft_prompt", "qpeft_r", "qpeft_a", LORA)},
    **{of_more(row): f"{HOME}-{MORE}-{row}-seed" for row in TESTED},
}
"""What is trained: row → how the names of its cells begin."""
FAMILIES = (
    *([(row, baseline, kind) for row in TESTED for baseline in BASELINES] for kind in KINDS),
    [(LORA, baseline, kind) for baseline in ("zero_shot", "qpeft_a") for kind in KINDS],
    [(of_more(row), baseline, "mixed") for row in TESTED for baseline in ("zero_shot", row)],
)
"""Comparisons, each family Holm-corrected by itself and fixed before its rows ranked these queries.

The last two were asked when a gain beside BM25 had been seen on other queries: of LoRA, and of more training queries.
"""


class Confirmation:
    """Rows, mean of their seeds, against what they are compared with.

    Args:
        folder: the JSON files that `run.py DATA confirm` wrote.
        ranked_before: queries that one of these rows had ranked before, by id.
    """

    def __init__(self, folder: Path, ranked_before: Collection[str]) -> None:
        self._before = ranked_before
        self._chunks = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
        finished = [name for name in self._chunks[0] if all(name in chunk for chunk in self._chunks)]
        self.rows = {"bm25": ["bm25"], "zero_shot": ["zero_shot"]}
        for row, begin in ROWS.items():
            if names := [name for name in finished if name.startswith(begin)]:
                self.rows[row] = names

    def values(self, row: str, kind: str, measure: str) -> dict[str, float]:
        """Return query id → the measure's mean over seeds."""
        each: dict[str, list[float]] = collections.defaultdict(list)
        for chunk in self._chunks:
            for name in self.rows[row]:
                for query, value in chunk[name].get(kind, {}).get(measure, {}).items():
                    each[query].append(value)
        return {query: statistics.fmean(found) for query, found in each.items()}

    def tests(self) -> list[dict[str, Any]]:
        """Return all comparisons in RR@10, of each family that is finished."""
        found = []
        for family in FAMILIES:
            if any(row not in self.rows for row, *_ in family):
                continue
            some = [self._test(*each) for each in family]
            corrected = (holm([test[name] for test in some]) for name in ("p", "p_without"))
            for test, p, without in zip(some, *corrected, strict=True):
                found.append({**test, "p_holm": p, "p_without_holm": without})
        return found

    def _test(self, row: str, baseline: str, kind: str) -> dict[str, Any]:
        own, other = self.values(row, kind, "RR@10"), self.values(baseline, kind, "RR@10")
        difference = np.array([own[query] - other[query] for query in other])
        low, high = bootstrap_interval(difference) or (0.0, 0.0)
        fresh = [{query: value for query, value in each.items() if query not in self._before} for each in (own, other)]
        return {
            "row": row, "against": baseline, "kind": kind, "difference": float(difference.mean()), "low": low,
            "high": high, "p": p_value(own, other),
            "without": statistics.fmean(fresh[0][query] - value for query, value in fresh[1].items()),
            "p_without": p_value(*fresh),
        }  # fmt: skip

    def markdown(self, tests: list[dict[str, Any]]) -> str:
        """Return means and comparisons as Markdown tables."""
        count = len(self.values("bm25", "per_query", "RR@10"))
        lines = [f"### Confirmation: trained on {HOME}, 320 queries unless said; {count:,} further test queries", ""]
        lines += [_line(["row (seeds)", *MEASURES, "RR@10, half BM25"]), _line(["---"] * (len(MEASURES) + 2))]
        for row, names in self.rows.items():
            means = [f"{statistics.fmean(self.values(row, 'per_query', m).values()):.3f}" for m in MEASURES]
            mixed = self.values(row, "mixed", "RR@10")
            means.append(f"{statistics.fmean(mixed.values()):.3f}" if mixed else "")
            lines.append(_line([f"{row} ({len(names)})", *means]))
        few = sum(query in self._before for query in self.values("bm25", "per_query", "RR@10"))
        head = ["RR@10 of", "minus", "difference", "95 %", "p (Holm)", f"without the {few} ranked before", "p (Holm)"]
        lines += ["", _line(head), _line(["---"] * len(head))]
        for test in tests:
            interval = f"{test['low']:+.3f} … {test['high']:+.3f}"
            against = f"{test['against']}{KINDS[test['kind']]}"
            line = [test["row"], against, f"{test['difference']:+.3f}", interval, shown(test["p_holm"])]
            lines.append(_line([*line, f"{test['without']:+.3f}", shown(test["p_without_holm"])]))
        return "\n".join([*lines, ""])


def p_value(one: dict[str, float], other: dict[str, float]) -> float | None:
    """Return the paired t-test's two-sided p."""
    return paired_t(np.array([one[query] - other[query] for query in other]))


def shown(p: float | None) -> str:
    """Return a p-value as it is printed."""
    return "–" if p is None else "<.001" if p < 0.001 else f"{p:.3f}".removeprefix("0")


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
