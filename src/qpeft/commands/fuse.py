"""Merge several runs by reciprocal rank, for instance BM25 and dense retrieval."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path

from qpeft.commands._output import check_output
from qpeft.data.trec import read_run, write_run
from qpeft.provenance import input_fingerprint, provenance, write_provenance
from qpeft.retrieval.fusion import reciprocal_rank_fusion


@dataclass(frozen=True)
class Config:
    """Fusion."""

    run: tuple[str, ...]
    """A run file; give two or more."""
    output: str
    """The run file to write (.gz packs it)."""
    depth: int | None = None
    """Passages kept per query; all by default."""
    k: int = 60
    """Constant of the method: the larger, the less the first ranks stand out."""
    tag: str | None = None
    """Name of the system in the run file."""


def run(config: Config) -> None:
    """Fuse and write the run with its provenance."""
    check_output(config.output, config.tag, read=config.run)
    fused = reciprocal_rank_fusion([read_run(path) for path in config.run], config.depth, config.k, config.tag)
    output = Path(config.output)
    write_run(fused, output)
    runs = [{"path": path, "sha256": input_fingerprint(path)} for path in config.run]
    write_provenance(output, provenance(command="fuse", options=dataclasses.asdict(config), runs=runs))
    print(f"{output}: {len(fused)} queries", file=sys.stderr)
