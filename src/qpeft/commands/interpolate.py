"""Mix a reranked run with its first stage: the weight is chosen on dev runs, then applied to test runs."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qpeft.commands._output import check_output
from qpeft.commands._run_provenance import read_run_provenance, scored_depth
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
    """Mix this many passages of each query; by default, and at most, what the runs' provenance says was scored."""
    tag: str | None = None
    """Name of the system in the run file."""


def run(config: Config) -> None:
    """Choose the weight if none is given, mix, and write the run with its provenance."""
    runs = (config.first, config.run, config.dev_first, config.dev_run)
    check_output(config.output, config.tag, read=filter(None, runs))
    depth = _depth(config, config.first, config.run)
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
            depth=_depth(config, config.dev_first, config.dev_run),
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


def _depth(config: Config, *runs: str) -> int | None:
    """Return how many passages of a query are mixed: as asked for, and no more than have scores in all the runs.

    Raises:
        OptionError: see `scored_depth`.
    """
    scored = [scored_depth(run, read_run_provenance(run)) for run in runs]
    return min((depth for depth in (config.depth, *scored) if depth is not None), default=None)
