"""Show why passages got their scores: what an adapter changed in each query token, and what its hint comes from.

Without --adapter, the log-probabilities of the query's tokens are shown. Log-probabilities and scores are in nats; a
score is the mean over the query's tokens.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qpeft import methods
from qpeft.analysis.pieces import words
from qpeft.commands._output import check_output
from qpeft.commands._passages import titled_passages
from qpeft.data.files import write_text
from qpeft.errors import OptionError
from qpeft.evaluation.tables import number
from qpeft.methods import query_likelihood
from qpeft.model_config import ModelConfig
from qpeft.types import Query

if TYPE_CHECKING:  # so that options can be listed without importing torch
    from qpeft.analysis.explain import Explanation

_CELL = len("−12.34 +12.34")


@dataclass(frozen=True)
class Config:
    """What is explained."""

    query: str
    """The query."""
    passage: tuple[str, ...]
    """A passage; may be given several times."""
    title: tuple[str, ...] = ()
    """Titles of the passages, as many as there are passages, or none."""
    adapter: str | None = None
    """Folder of a trained adapter."""
    template: str | None = None
    """Name of a template or path of a YAML file; by default the adapter's, else plain."""
    max_passage_tokens: int | None = None
    """Cut passages to this many tokens; by default as the adapter was trained."""
    html: str | None = None
    """Write a page to this file."""
    json: bool = False
    """Print JSON lines, one for each passage in the order given, instead of tables."""
    attention: bool = False
    """Also say, on the page and in JSON, what each query token attends to."""


def run(config: Config, model: ModelConfig) -> None:
    """Explain and print; write a page where asked to."""
    passages = titled_passages(config.passage, config.title)
    if config.html is not None:
        check_output(config.html, option="--html")
    from qpeft.analysis.explain import explain
    from qpeft.loading import load_lm

    method = methods.chosen(None, config.adapter)
    if method != "query_likelihood":
        raise OptionError(f"only query likelihood can be explained; the adapter was trained for --method {method}")
    options = query_likelihood.Config(
        template=config.template, adapter=config.adapter, max_passage_tokens=config.max_passage_tokens
    )
    explanations = explain(
        query_likelihood.build_scorer(options, load_lm(model)),
        Query("query", config.query),
        passages,
        attention=config.attention,
    )
    if config.json:
        for index, each in enumerate(explanations):
            print(json.dumps(_line(config.query, index, each), ensure_ascii=False))
    else:
        _print_tables(explanations)
    if config.html is not None:
        from qpeft.analysis.explanation_page import explanation_page

        what = f"with {Path(config.adapter).name}" if config.adapter else "alone"
        with write_text(config.html) as file:
            file.write(explanation_page([(config.query, explanations)], f"{model.model} {what}"))
        print(f"page: {config.html}", file=sys.stderr)


def _line(query: str, index: int, explanation: Explanation) -> dict[str, Any]:
    from qpeft.analysis.explain import as_record

    passage = explanation.passage
    record = as_record(explanation)
    return {"query": query, "index": index, "title": passage.title, "passage": passage.text, **record}


def _print_tables(explanations: Sequence[Explanation]) -> None:
    """Print the ranking, what changed in each query token, and the words that the hint comes from."""
    from qpeft.analysis.explain import most_read

    ordered = sorted(explanations, key=lambda each: each.place)
    console = Console()
    console.print(_ranking(ordered))
    first = words([token.text for token in ordered[0].query])
    wide = max(max(map(len, first)), len("query token"))
    across = max(1, (console.width - wide - 4) // (_CELL + 3))
    for start in range(0, len(ordered), across):
        console.print(_query_tokens(first, ordered[start : start + across]))
    if any(each.hint or most_read(each) for each in ordered):
        console.print(_passage_words(ordered))


def _ranking(ordered: Sequence[Explanation]) -> Table:
    hinted = ordered[0].hinted_score is not None
    table = _table("rank", *(["moved"] if hinted else []), "score", *(["with adapter"] if hinted else []), "passage")
    for each in ordered:
        cells = [Text(str(each.place)), Text(number(each.score, 3))]
        if each.hinted_score is not None:
            moved = f"↑{each.moved}" if each.moved > 0 else f"↓{-each.moved}" if each.moved < 0 else "="
            cells.insert(1, Text(moved, style=_style(each.moved)))
            change = each.hinted_score - each.score
            cells.append(_changed(each.hinted_score, change, 3, _style(change)))
        passage = each.passage
        shown = Text(" ".join(f"{passage.title} {passage.text}".split()), overflow="ellipsis", no_wrap=True)
        table.add_row(*cells, shown)
    return table


def _query_tokens(first: Sequence[str], ordered: Sequence[Explanation]) -> Table:
    """Return query tokens × passages: log-probabilities, with the adapter where there is one, and what it changed."""
    table = _table("query token", *(f"rank {each.place}" for each in ordered))
    reach = max((abs(token.change or 0.0) for each in ordered for token in each.query), default=0.0)
    for place, word in enumerate(first):
        cells = []
        for each in ordered:
            token = each.query[place]
            if token.hinted is None or token.change is None:
                cells.append(Text(number(token.log_prob, 2)))
            else:
                strong = " bold" if abs(token.change) >= reach / 2 else ""
                cells.append(_changed(token.hinted, token.change, 2, _style(token.change) + strong))
        table.add_row(Text(word), *cells)
    return table


def _passage_words(ordered: Sequence[Explanation]) -> Table:
    from qpeft.analysis.explain import most_read

    table = _table("rank", "hint" if any(each.hint for each in ordered) else "most read")
    for each in ordered:
        shares = (f"{word} {share:.0%}" for word, share in most_read(each))
        table.add_row(Text(str(each.place)), Text(" · ".join(each.hint or shares)))
    return table


def _changed(value: float, change: float, digits: int, style: str) -> Text:
    return Text.assemble(number(value, digits), " ", (number(change, digits, signed=True), style))


def _style(change: float) -> str:
    return "" if change == 0 else "dodger_blue2" if change > 0 else "dark_orange3"


def _table(*names: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in names:
        long = name in ("passage", "hint", "most read")
        table.add_column(name, justify="left" if long or name == "query token" else "right", no_wrap=not long)
    return table
