"""What would keep a run from being written at the end, found before the work."""

from __future__ import annotations

from pathlib import Path

from qpeft.data.trec import fits_column
from qpeft.errors import OptionError


def check_output(output: str, tag: str | None = None) -> None:
    """Raise OptionError for an output that is a folder, or a tag that cannot stand in a column."""
    if Path(output).is_dir():
        raise OptionError(f"--output {output}: is a folder")
    if tag is not None and not fits_column(tag):
        raise OptionError(f"--tag {tag!r} cannot stand in a column: it is empty or holds white space")
