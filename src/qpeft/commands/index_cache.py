"""Encode a collection's passages ahead, so that reranking them later only reads queries.

Keys and values of every passage go to --passage-cache-folder, where `rerank`, `train` and others find them when given
the same model, number type, template and folder. A passage that must be cut to leave room for a query is encoded again
for queries of other lengths, unless --max-passage-tokens cuts all alike. Interrupted, the same command continues.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from qpeft.commands._progress import progress_bar
from qpeft.data.collection import open_collection
from qpeft.errors import OptionError
from qpeft.model_config import ModelConfig
from qpeft.types import Query

A_QUERY = Query("query", "a")
"""Nothing that is encoded depends on it."""
AT_A_TIME = 256


@dataclass(frozen=True)
class Config:
    """Encoding ahead."""

    collection: str
    """A BEIR folder, mini (embedded), or ir_datasets:ID."""
    template: str = "plain"
    """Name of a template or path of a YAML file; an adapter's, if it is to be used."""
    max_passage_tokens: int | None = None
    """Cut passages to this many tokens, as later in reranking."""


def run(config: Config, model: ModelConfig) -> None:
    """Encode what is not yet there, and say how much there is."""
    if model.passage_cache_folder is None:
        raise OptionError("--passage-cache-folder is missing: where encoded passages go")
    passages = open_collection(config.collection).passages

    from qpeft.loading import load_lm
    from qpeft.template import Prompt, load_template

    template = load_template(config.template)
    if not template.target:
        raise OptionError(f"--template {config.template}: it has no target, and such rows are never split and kept")
    if -1 < template.context.find("{hint}") < template.context.index("{passage}"):
        raise OptionError(f"--template {config.template}: a hint before the passage leaves nothing to keep")
    lm: Any = load_lm(dataclasses.replace(model, passage_cache=0.0))
    prompt = Prompt(template, lm.tokenizer, lm.max_length, max_passage_tokens=config.max_passage_tokens)
    cut = 0
    with progress_bar("index-cache", len(passages), unit="passages") as bar:
        left = iter(passages.values())
        while some := list(itertools.islice(left, AT_A_TIME)):
            prompt.read_ahead(some)
            rows = [prompt.rows(A_QUERY, passage)[0] for passage in some]
            cut += sum(row.truncated for row in rows)
            contexts = [row.context[: row.hint] for row in rows]
            for own in _together([each for each in contexts if not lm.store.on_disk(lm.key(each))], lm.batch_tokens):
                lm.encode_all(own)
            bar.advance(len(some))
    size = sum(path.stat().st_size for path in lm.store.folder.rglob("*.safetensors"))
    print(f"{len(passages):,} passages, {lm.store.misses:,} encoded now, {size / 2**30:.2f} GiB in {lm.store.folder}")
    if cut:
        print(f"{cut:,} passages were cut; --max-passage-tokens cuts alike for all queries")


def _together(contexts: Iterable[tuple[int, ...]], tokens: int) -> Iterator[list[tuple[int, ...]]]:
    """Yield contexts in lists of so many tokens: what is encoded is in memory until all of a list are on disk."""
    together: list[tuple[int, ...]] = []
    for context in contexts:
        if together and sum(map(len, together)) + len(context) > tokens:
            yield together
            together = []
        together.append(context)
    if together:
        yield together
