"""Mix a reranked run with its first stage: the weight is chosen on dev runs, then applied to test runs."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qpeft.commands._output import check_output
from qpeft.commands._run_provenance import check_scores, read_run_provenance
from qpeft.data.collection import open_collection
from qpeft.data.trec import read_run, write_run
from qpeft.errors import OptionError
from qpeft.evaluation.interpolation import choose_weight, interpolate
from qpeft.provenance import input_fingerprint, provenance, write_provenance


@dataclass(frozen=True)
class Config:
    """Interpolation."""

    first: str
    """The first stage's run."""
    run: str
    """The reranked run."""
    output: str
    """The run file to write (.gz packs it)."""
    weight: float | None = None
    """Share of the first stage, in [0, 1]; without it, the dev options choose."""
    collection: str | None = None
    """The collection that judges the dev runs: a BEIR folder, mini, or ir_datasets:ID."""
    dev_split: str = "dev"
    """The split that the dev runs rank."""
    dev_first: str | None = None
    """The first stage's run on dev."""
    dev_run: str | None = None
    """The reranked run on dev."""
    measure: str = "RR@10"
    """What the weight is chosen by."""
    depth: int | None = None
    """The reranking depth, where the reranked run carries the passages below it along; by default as its provenance
    says."""
    tag: str | None = None
    """Name of the system in the run file."""


def run(config: Config) -> None:
    """Choose the weight if none is given, mix, and write the run with its provenance."""
    check_output(config.output, config.tag, read=[config.first, config.run])
    depth = _depth(config, config.run)
    facts: dict[str, Any] = {"command": "interpolate", "options": {**dataclasses.asdict(config), "depth": depth}}
    weight = config.weight
    if weight is None:
        if config.collection is None or config.dev_first is None or config.dev_run is None:
            raise OptionError("without --weight, choosing it needs --collection, --dev-first and --dev-run")
        choice = choose_weight(
            read_run(config.dev_first),
            read_run(config.dev_run),
            open_collection(config.collection).qrels(config.dev_split),
            config.measure,
            depth=_depth(config, config.dev_run),
        )
        weight = choice.weight
        facts["choice"] = dataclasses.asdict(choice)
        best = dict(choice.curve)[weight]
        print(f"weight {weight:g}: {config.measure} {best:.4f} on {config.dev_split}", file=sys.stderr)
    mixed = interpolate(read_run(config.first), read_run(config.run), weight, depth=depth, tag=config.tag)
    output = Path(config.output)
    write_run(mixed, output)
    facts["runs"] = [{"path": path, "sha256": input_fingerprint(path)} for path in (config.first, config.run)]
    write_provenance(output, provenance(**facts, weight=weight))


def _depth(config: Config, run: str) -> int | None:
    """Return how many passages of a query have real scores, as asked for, or as a file beside the run says.

    Raises:
        OptionError: the file says that some candidates have none.
    """
    made = read_run_provenance(run)
    check_scores(run, made)
    if config.depth is not None:
        return config.depth
    depth = made["options"].get("depth") if made and made.get("command") == "rerank" else None
    return depth if isinstance(depth, int) else None
