"""Turn a file of another format into a BEIR folder, which every command takes as --collection."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from qpeft.data.convert import convert


@dataclass(frozen=True)
class Config:
    """Conversion."""

    source: str
    """The file to read, or, with the format collection, whatever --collection takes."""
    output: str
    """The folder to make."""
    format: str
    """squad; dpr (retrieved lists with ctxs); evidence (DPR's passages, TSV); dpr-training; groups (JSON lines of
    FlagEmbedding or Tevatron); requests (JSON lines of rank_llm); or collection (whatever --collection takes)."""
    split: str | None = None
    """Name of the judgements' split; by default train for training formats, test for the others."""
    evidence: str | None = None
    """DPR's evidence TSV, for retrieved lists without texts."""


def run(config: Config) -> None:
    """Convert."""
    convert(config.source, config.output, config.format, split=config.split, evidence=config.evidence)
    print(f"{config.output} is ready: qpeft data info --collection {config.output}", file=sys.stderr)
