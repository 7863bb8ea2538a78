"""Yes or no: how much likelier the model finds one answer than the other, right behind a question about relevance.

    score(q, d) = log P( yes | q, d ) − log P( no | q, d )        nats: the log-odds of the two answers

The read-out of monoT5 (Nogueira et al. 2020, arXiv 2003.06713), with any decoder or encoder-decoder, zero-shot or
trained. The two answers must be one token each where they stand, behind the template's last blank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from qpeft.errors import OptionError
from qpeft.kept_tokens import KeptTokens
from qpeft.methods import _read_out
from qpeft.methods._read_out import ReadOutScorer
from qpeft.methods._rows import Options, open_prompt, query_batches
from qpeft.pointwise import Pointwise
from qpeft.template import Prompt
from qpeft.types import Reranker

if TYPE_CHECKING:  # so that options can be listed without importing torch
    from torch import Tensor

    from qpeft.adapter import Adapter
    from qpeft.adapters._folder import AdapterFolder
    from qpeft.lm.pretrained import PretrainedLM
    from qpeft.lm.read_out import Answers

TEMPLATE = "yes_no"
SCORES: Literal["answers"] = "answers"


@dataclass(frozen=True)
class Trained:
    """Options of yes or no that a trained adapter keeps."""

    yes: str = "yes"
    """The answer for a relevant passage."""
    no: str = "no"
    """The answer for any other."""


@dataclass(frozen=True)
class Config(Options):
    """Options of yes or no."""

    yes: str | None = None
    """The answer for a relevant passage; by default the adapter's, else yes."""
    no: str | None = None
    """The answer for any other; by default the adapter's, else no."""


def build(config: Config, lm: PretrainedLM) -> Reranker:
    """Return a reranker that scores with `lm`.

    Raises:
        OptionError: options that contradict each other, or an answer that is not one token.
    """
    return Pointwise(build_scorer(config, lm), query_batches(config, lm))


def build_scorer(
    config: Config, lm: PretrainedLM, opened: AdapterFolder | None = None, *, kept: KeptTokens | None = None
) -> ReadOutScorer:
    """Return the scorer alone; see `query_likelihood.build_scorer`.

    Raises:
        OptionError: options that contradict each other, or an answer that is not one token.
    """
    prompt, opened, facts = open_prompt("yes_no", config, lm, opened, kept, template=TEMPLATE)
    _read_out.check_template(prompt)
    trained = {} if opened is None else opened.method_options
    answers = {}
    for name in ("yes", "no"):
        given, own = getattr(config, name), trained.get(name)
        if own is not None and given not in (None, own):
            raise OptionError(f"--{name} {given}: the adapter was trained with {own!r}")
        answers[name] = given or own or name
    tokens = tuple(_token(prompt, lm, name, text) for name, text in answers.items())
    if tokens[0] == tokens[1]:
        raise OptionError(f"--yes {answers['yes']} and --no {answers['no']} are the same token")
    reading = AnswerReading(tokens)
    scorer = ReadOutScorer(config, lm, prompt, reading, None if opened is None else opened.adapter)
    scorer.facts |= {**facts, "answers": answers}
    return scorer


def _token(prompt: Prompt, lm: PretrainedLM, option: str, text: str) -> int:
    ids = prompt.following(text)
    if len(ids) != 1 or ids[0] == lm.tokenizer.unk_token_id:
        pieces = lm.tokenizer.convert_ids_to_tokens(list(ids))
        raise OptionError(f"--{option} {text}: must be one token behind the template; it is {len(ids)}: {pieces}")
    return ids[0]


@dataclass(frozen=True)
class AnswerReading:
    """The log-probabilities of the two answers; `tokens` are yes and no."""

    tokens: tuple[int, ...]

    def read_out(self, adapter: Adapter | None) -> Answers:
        """Return the two tokens, whatever the adapter."""
        from qpeft.lm.read_out import Answers

        return Answers(self.tokens)

    def scores(self, values: Tensor) -> Tensor:
        """Return the log-odds `[B]` of `[B, 2]`."""
        return values[:, 0] - values[:, 1]

    def answered(self, values: Tensor) -> Tensor:
        """Return the log of both answers' probability `[B]`, in nats: how sure it is that one of them follows."""
        return values.logsumexp(-1)
