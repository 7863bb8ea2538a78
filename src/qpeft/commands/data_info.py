"""Describe a collection: passages, lengths, queries and judgements of each split."""

from __future__ import annotations

import json
from dataclasses import dataclass

from qpeft.data.collection import open_collection
from qpeft.data.info import info


@dataclass(frozen=True)
class Config:
    """Collection."""

    collection: str
    """A BEIR folder, mini (embedded), or ir_datasets:ID."""


def run(config: Config) -> None:
    """Print the description as JSON."""
    print(json.dumps(info(open_collection(config.collection)), indent=2, ensure_ascii=False))
