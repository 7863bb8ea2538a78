"""The unfinished output of `rerank`: rankings of whole windows of queries."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qpeft.commands._unfinished import Unfinished
from qpeft.types import Hit, QueryBatches, Ranking, ScoringCounts


class Partial:
    """Finished rankings beside an output that is not there yet.

    Queries are worked on in batches, and what is left of a batch that was not finished is dropped: a score may depend,
    in its last bits, on the other rows of its batch, and a resumed run must equal an uninterrupted one.

    Args:
        output: the file that is being made.
        resume: continue what stands there.

    Raises:
        StateError: an unfinished run stands there and `resume` was not given.
    """

    def __init__(self, output: Path, resume: bool) -> None:
        self._unfinished = Unfinished(output.with_name(output.name + ".partial"), "run", resume)
        self.settings = self._unfinished.settings
        self.rankings: list[Ranking] = []
        self._before = ScoringCounts()

    def open(self, facts: Mapping[str, Any], settings: Mapping[str, Any], batches: QueryBatches) -> None:
        """Check that the file belongs to this very run, and get ready to append.

        Raises:
            StateError: it was made with other options, data or model, or another process is working on it.
        """
        finished = self._unfinished.lines
        del finished[batches.whole(len(line["hits"]) for line in finished) :]
        self._unfinished.open(facts, settings)
        self.rankings = [
            Ranking(line["query"], tuple(Hit(passage_id, score) for passage_id, score in line["hits"]))
            for line in finished
        ]
        if finished:
            self._before = ScoringCounts(**finished[-1]["counts"])

    def add(self, ranking: Ranking, counts: ScoringCounts) -> None:
        """Append a finished query; `counts` are those since the process began."""
        self._unfinished.add(
            {
                "query": ranking.query_id,
                "hits": [[hit.passage_id, hit.score] for hit in ranking.hits],
                "counts": dataclasses.asdict(self.counts(counts)),
            }
        )

    def counts(self, counts: ScoringCounts) -> ScoringCounts:
        """Return `counts` of this process together with those of the earlier ones."""
        total = dataclasses.replace(self._before)
        total.add(counts)
        return total

    def close(self) -> None:
        """Stop appending; the file stays."""
        self._unfinished.close()

    def remove(self) -> None:
        """Delete the file, once the output is in place."""
        self._unfinished.remove()
