"""Rankings under every ablation of an adapter, with the work that they have in common done once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from qpeft.adapters._lora import LoraAdapter
from qpeft.analysis.ablation import Places, plan
from qpeft.errors import ModelError
from qpeft.lm.causal import CausalLM
from qpeft.lm.depth import find_layers
from qpeft.lm.replay import Replay
from qpeft.types import Candidates, Ranking, Reranker


class Ablated:
    """Ranks candidates under several sets of active additions.

    The first candidates are ranked both ways, with shared states and without. If any score differs by a bit, or states
    cannot be shared, all is done without. Where batches change from one set to the next, as when memory runs out, that
    is so for the candidates at hand alone. `why_not` says why the last ones were ranked without; it is empty if not.

    Args:
        lm: the model.
        adapter: an opened adapter of it.
        reranker: ranks with that adapter, by whatever method.
        sets: additions that act; each is run once, however often it stands here.

    Raises:
        OptionError: one of the sets has an addition that the adapter has not.
    """

    def __init__(self, lm: CausalLM, adapter: LoraAdapter, reranker: Reranker, sets: Iterable[Places]) -> None:
        self._adapter, self._reranker = adapter, reranker
        self.why_not = ""
        self._replay: Replay | None = None
        depth = lm.model.config.get_text_config().num_hidden_layers
        wanted = set(sets)
        for active in wanted:
            with adapter.only(active):  # an addition that is not there shows before the work
                pass
        self._steps = plan(wanted, depth)
        self._checked = False
        try:
            self._replay = Replay(find_layers(lm.model))
        except ModelError as error:
            self.why_not = str(error)

    @property
    def work(self) -> tuple[int, int]:
        """Layers that were run with shared states, and those that would have been run without; counted by call."""
        if self._replay is None:
            return 0, 0
        return self._replay.computed, self._replay.computed + self._replay.spared

    def rank(self, items: Sequence[Candidates]) -> dict[Places, list[Ranking]]:
        """Return the rankings of the items, in their order, under every set."""
        if self._replay is None:
            return self._plain(items)
        if self._checked:
            try:
                found = self._shared(items, self._replay)
            except ModelError as error:
                self.why_not = str(error)
                return self._plain(items)
            self.why_not = ""
            return found
        self._checked = True
        expected = self._plain(items)
        try:
            if self._shared(items, self._replay) == expected:
                return expected
            self.why_not = "shared states change scores"
        except ModelError as error:
            self.why_not = str(error)
        self._replay = None
        return expected

    def _plain(self, items: Sequence[Candidates]) -> dict[Places, list[Ranking]]:
        found = {}
        for step in self._steps:
            with self._adapter.only(step.active):
                found[step.active] = list(self._reranker.rerank(items))
        return found

    def _shared(self, items: Sequence[Candidates], replay: Replay) -> dict[Places, list[Ranking]]:
        found = {}
        for step in self._steps:
            with self._adapter.only(step.active), replay.run(step.shared, step.keep):
                found[step.active] = list(self._reranker.rerank(items))
        return found
