"""Why a passage got its score: which query tokens a hint made likelier, and which passage tokens the hint comes from.

Query likelihood is a mean over the query's tokens, so the tokens' log-probabilities are the explanation of the score,
not a model of it. What an adapter chose or attended to comes from the forward pass that scores.

Shapes: `n` query tokens, `m` passage tokens that the adapter reads, `k` chosen ones.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from qpeft.adapter import Adapter, Hints, Pairs
from qpeft.analysis.pieces import pieces, words
from qpeft.errors import InputError, OptionError
from qpeft.lm.pretrained import RowLogProbs
from qpeft.methods._rows import RowScorer
from qpeft.methods.query_likelihood import QueryLikelihood
from qpeft.template import Row, Template
from qpeft.types import Passage, Query, Ranking

Reasons = dict[tuple[int, ...], tuple[Tensor | None, Tensor | None]]
"""Why an adapter wrote what it wrote: what it read of a row → tokens that it chose `[k]`, its attention `[n, m]`."""


@dataclass(frozen=True, slots=True)
class QueryToken:
    """A scored token; log-probabilities in nats, `hinted` with the hint. `of_template`: a scored cue or end mark."""

    text: str
    log_prob: float
    hinted: float | None = None
    of_template: bool = False

    @property
    def change(self) -> float | None:
        """What the hint added to the log-probability, in nats."""
        return None if self.hinted is None else self.hinted - self.log_prob


@dataclass(frozen=True, slots=True)
class PassageToken:
    """A token that stands before the hint, or that the adapter reads.

    `chosen` is its best rank in the hint, from 1; `attention` what it got of 1, averaged over those that attend. None
    where the adapter does not choose, or does not attend. `of_template`: a word of the template, not of the passage.
    """

    text: str
    chosen: int | None = None
    attention: float | None = None
    of_template: bool = False


@dataclass(frozen=True, slots=True)
class Explanation:
    """A passage's score and place among the passages given, without and with (`hinted`) the adapter's hint.

    `score` is the mean over `query` of the log-probabilities, in nats. `hint` lists the chosen tokens, first to last.
    `attention` `[n, m]`, where it was asked for, is from the tokens of `query` that are not of the template to
    `tokens`; None where an adapter's own vectors attend, not the query's tokens.
    """

    passage: Passage
    query: tuple[QueryToken, ...]
    tokens: tuple[PassageToken, ...]
    score: float
    rank: int
    hinted_score: float | None = None
    hinted_rank: int | None = None
    hint: tuple[str, ...] = ()
    attention: tuple[tuple[float, ...], ...] | None = None
    truncated: bool = False

    @property
    def place(self) -> int:
        """The rank that counts: with the hint, if there is one."""
        return self.rank if self.hinted_rank is None else self.hinted_rank

    @property
    def moved(self) -> int:
        """Places won by the hint; negative: lost."""
        return self.rank - self.place


def explain(
    scorer: RowScorer,
    query: Query,
    passages: Sequence[Passage],
    *,
    max_passage_tokens: int | None = None,
    attention: bool = False,
) -> list[Explanation]:
    """Explain the scores of passages for a query, in the order given.

    Both scores are of the same tokens: where room is kept for a hint, the score without it is of the passage so cut.

    Args:
        scorer: of query likelihood, with an adapter or without.
        query: what is scored.
        passages: ranked against each other; their ids must differ.
        max_passage_tokens: a bound on these passages, beside the scorer's own.
        attention: also return the attention of each query token.

    Raises:
        OptionError: the scorer is of another method.
        QueryError: the query is empty, or leaves no room for a passage.
        InputError: a passage has no tokens.
        ScoreError: the model gave a score that is no number, or two passages have one id.
    """
    if not isinstance(scorer, QueryLikelihood):
        raise OptionError(f"only a scorer of query likelihood can be explained, not {type(scorer).__name__}")
    lm, prompt, adapter = scorer.lm, scorer.prompt, scorer.adapter
    template = prompt.template
    rows = [prompt.rows(query, passage, max_passage_tokens=max_passage_tokens)[0] for passage in passages]
    for row, passage in zip(rows, passages, strict=True):
        if row.passage[0] == row.passage[1]:
            raise InputError(f"passage {passage.id!r} has no tokens")
    alone = lm.log_probs(rows)
    hinted: list[RowLogProbs | None] = [None] * len(rows)
    hinted_ranks: dict[str, int] = {}
    reasons: Reasons = {}
    if adapter is not None:
        with adapter.register_forward_hook(functools.partial(_record, reasons)):
            hinted = [*lm.log_probs(rows, adapters=adapter)]
        hinted_ranks = _ranks(query, passages, list(map(_score, hinted)))
    ranks = _ranks(query, passages, list(map(_score, alone)))
    found = []
    for row, passage, before, after in zip(rows, passages, alone, hinted, strict=True):
        read = _Reading(row, lm.tokenizer, template, passage, adapter, reasons)
        found.append(
            Explanation(
                passage,
                _query_tokens(row, lm.tokenizer, template, query, before, after),
                read.tokens(),
                _score(before),
                ranks[passage.id],
                _score(after) if after else None,
                hinted_ranks.get(passage.id),
                read.hint(),
                read.attention() if attention else None,
                row.truncated,
            )
        )
    return found


def as_record(explanation: Explanation) -> dict[str, Any]:
    """Return an explanation for JSON, without the passage."""
    facts = dataclasses.asdict(explanation)
    tokens = {"query_tokens": facts.pop("query"), "passage_tokens": facts.pop("tokens")}
    del facts["passage"]
    return {**facts, **tokens}


def most_read(explanation: Explanation, count: int = 10) -> list[tuple[str, float]]:
    """Return the passage's words with the most attention, and their shares of 1 where these are a hundredth or more.

    Equal words are taken together.
    """
    shares: dict[str, float] = {}
    listed = words([token.text for token in explanation.tokens])
    for word, token in zip(listed, explanation.tokens, strict=True):
        if token.attention:
            shares[word.lower()] = shares.get(word.lower(), 0.0) + token.attention
    ordered = sorted(shares.items(), key=lambda item: -item[1])
    return [(word, share) for word, share in ordered[:count] if share >= 0.01]


def _record(reasons: Reasons, adapter: nn.Module, given: tuple[Pairs], hints: Hints) -> None:
    """Keep why an adapter wrote what it wrote, by what it read of a row."""
    (pairs,) = given
    for row, (ids, mask) in enumerate(zip(pairs.passage, pairs.passage_mask, strict=True)):
        chosen = None if hints.chosen is None else hints.chosen[row]
        attention = None if hints.attention is None else hints.attention[row][:, mask].float().cpu()
        reasons[tuple(ids[mask].tolist())] = chosen, attention


class _Reading:
    """What an adapter read of one row, token by token; of a row without an adapter, its passage."""

    def __init__(
        self,
        row: Row,
        tokenizer: Any,
        template: Template,
        passage: Passage,
        adapter: Adapter | None,
        reasons: Reasons,
    ) -> None:
        bos = int(tokenizer.bos_token_id is not None)
        self._span = row.passage
        if adapter is not None:
            self._span = row.read(template=adapter.reads_template, states=adapter.reads_layer is not None)
        self._passage = range(*row.passage)
        self._texts = _context_texts(row, tokenizer, template, passage, bos)
        read = row.context[slice(*self._span)]
        self._by_query_token = adapter is not None and adapter.hint_length(2) > adapter.hint_length(1)
        chosen, self._attention = reasons.get(read, (None, None))
        self._chosen = [] if chosen is None else [self._span[0] + place for place in chosen.tolist() if place >= 0]

    def tokens(self) -> tuple[PassageToken, ...]:
        ranks: dict[int, int] = {}
        for rank, place in enumerate(self._chosen, start=1):
            ranks.setdefault(place, rank)
        places, passage = range(*self._span), self._passage
        shares = [None] * len(places) if self._attention is None else self._attention.mean(0).tolist()
        return tuple(
            PassageToken(text if place > places.start else text.lstrip(), ranks.get(place), share, place not in passage)
            for place, text, share in zip(places, self._texts[slice(*self._span)], shares, strict=True)
        )

    def hint(self) -> tuple[str, ...]:
        listed = words(self._texts)
        return tuple(listed[place] for place in self._chosen)

    def attention(self) -> tuple[tuple[float, ...], ...] | None:
        if self._attention is None or not self._by_query_token:
            return None
        return tuple(map(tuple, self._attention.tolist()))


def _context_texts(row: Row, tokenizer: Any, template: Template, passage: Passage, bos: int) -> list[str]:
    """Return a piece for each token of the context; instruction, literals and passage were tokenised apart."""
    start, end = row.passage
    before, _, after = template.context.replace("{hint} ", "").replace("{hint}", "").partition("{passage}")
    texts = pieces(tokenizer, row.context[:bos])
    for ids, text in (
        (row.context[bos : row.body], template.instruction),
        (row.context[max(bos, row.body) : start], before),
        (row.context[start:end], template.passage_text(passage)),
        (row.context[end:], after),
    ):
        shown = pieces(tokenizer, ids, text.strip(" "))
        if shown and texts and texts[-1][-1:].strip() and shown[0][:1].strip():
            shown[0] = f" {shown[0]}"
        texts += shown
    return texts


def _query_tokens(
    row: Row, tokenizer: Any, template: Template, query: Query, before: RowLogProbs, after: RowLogProbs | None
) -> tuple[QueryToken, ...]:
    """Return the scored tokens of a row, those of the query as they are written in its text."""
    stop = len(row.target) - int(template.score_end and tokenizer.eos_token_id is not None)
    start = stop - len(row.query)
    texts = pieces(tokenizer, row.target[:start], template.target.removesuffix("{query}").strip(" "))
    texts += pieces(tokenizer, row.query, template.query_text(query))
    texts += pieces(tokenizer, row.target[stop:])
    scored = [place for place, counts in enumerate(row.scored) if counts]
    hinted = [None] * len(scored) if after is None else after.target.tolist()
    return tuple(
        QueryToken(texts[place], value, with_hint, not start <= place < stop)
        for place, value, with_hint in zip(scored, before.target.tolist(), hinted, strict=True)
    )


def _score(value: RowLogProbs | None) -> float:
    assert value is not None
    return float(value.target.double().mean())


def _ranks(query: Query, passages: Sequence[Passage], scores: Sequence[float]) -> dict[str, int]:
    """Return passage id → rank from 1; equal scores keep the order given, as in `Reranker.rank`."""
    ranking = Ranking.from_scores(query.id, [(p.id, score) for p, score in zip(passages, scores, strict=True)])
    found = {hit.passage_id: hit.score for hit in ranking.hits}
    ordered = sorted((passage.id for passage in passages), key=lambda passage_id: -found[passage_id])
    return {passage_id: rank for rank, passage_id in enumerate(ordered, start=1)}
