"""What training is judged by: a ranking measure on a fixed list of dev candidates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qpeft.adapter import Adapter
from qpeft.errors import OptionError
from qpeft.evaluation.measures import evaluate, parse_measures
from qpeft.methods._rows import RowScorer
from qpeft.pointwise import Pointwise
from qpeft.training.processes import gathered, share
from qpeft.types import Candidates, Run


class DevRanking:
    """Dev queries with their candidates and judgements.

    Args:
        scorer: of the method, with the frozen model.
        candidates: the same lists at every evaluation.
        qrels: their judgements.
        measure: what decides.

    Attributes:
        name: the measure's canonical name, under which it is reported.
        zero_shot: whether the model can rank without an adapter.

    Raises:
        OptionError: an unknown measure, or several.
    """

    def __init__(
        self,
        scorer: RowScorer,
        candidates: Sequence[Candidates],
        qrels: Mapping[str, Mapping[str, int]],
        measure: str,
    ) -> None:
        self._scorer = scorer
        self.zero_shot = scorer.using(None).ready
        self._candidates = candidates
        self._qrels = {item.query.id: qrels[item.query.id] for item in candidates}
        parsed = parse_measures(measure)
        if len(parsed) > 1:
            raise OptionError(f"--measure {measure!r}: one measure decides, not {len(parsed)}")
        self.name = str(parsed[0])

    def rank(self, adapter: Adapter | None) -> Run:
        """Return all candidates in the order of the model with an adapter, or of the model alone."""
        part = list(Pointwise(self._scorer.using(adapter)).rerank(share(self._candidates)))
        return Run(gathered(part), "dev")

    def measure(self, adapter: Adapter | None) -> dict[str, float]:
        """Return the measure, averaged over the dev queries."""
        means = evaluate(self.rank(adapter), self._qrels, [self.name]).means
        return {name: value or 0.0 for name, value in means.items()}
