"""Whether the contexts of a training fit in memory, to be encoded once and kept.

A store that holds only some of them would be of little use: by the time that one is read again, in the next epoch,
others have taken its place. Then it is quicker to encode those of a step together, and to keep none.
"""

from __future__ import annotations

from collections.abc import Sequence

from qpeft.lm import CausalLM
from qpeft.template import Prompt
from qpeft.training.config import TrainingConfig
from qpeft.types import Candidates, Group

SAMPLE = 200
"""Contexts whose lengths are taken for those of all."""


def contexts_bytes(
    lm: CausalLM, prompt: Prompt, groups: Sequence[Group], config: TrainingConfig, dev: Sequence[Candidates]
) -> int:
    """Return about how many bytes the encoded contexts of all epochs take, those of dev among them.

    Args:
        lm: the frozen model; it encodes one context.
        prompt: template and tokenizer.
        groups: training queries with their passages.
        config: how many negatives are drawn, and how often.
        dev: what is ranked at evaluations.
    """
    pairs = [(group.query, passage) for group in groups for passage in (group.positives[0], *group.negatives)]
    known = {passage.id for _, passage in pairs}
    drawn = sum(1 + min(len(group.negatives), config.negatives * config.epochs) for group in groups)
    ranked = {passage.id for item in dev for passage in item.passages} - known
    every = max(1, len(pairs) // SAMPLE)
    rows = [prompt.rows(query, passage)[0] for query, passage in pairs[::every]]
    lengths = [len(row.context[: row.hint]) for row in rows]
    cache = lm.encode(rows[0].context[: rows[0].hint]).cache
    return int((min(drawn, len(known)) + len(ranked)) * sum(lengths) / len(lengths) * cache.nbytes / cache.shape[3])
