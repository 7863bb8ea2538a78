"""What would keep an output from being written at the end, found before the work."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path

from qpeft.data.trec import fits_column
from qpeft.errors import OptionError, StateError


def check_output(output: str, tag: str | None = None, *, read: Iterable[str] = (), option: str = "--output") -> None:
    """Raise OptionError for an output that is no file, or is what is read, or a tag that cannot stand in a column."""
    if output in ("", "-"):
        raise OptionError(f"{option} {output!r}: name a file, or /dev/stdout")
    if Path(output).is_dir():
        raise OptionError(f"{option} {output}: is a folder")
    if any(Path(output).is_file() and Path(path).exists() and Path(output).samefile(path) for path in read):
        raise OptionError(f"{option} {output}: is what is read, and would be lost")
    if tag is not None and not fits_column(tag):
        raise OptionError(f"--tag {tag!r} cannot stand in a column: it is empty or holds white space")


def check_adapter_folder(output: Path) -> None:
    """Raise StateError unless an adapter may be written to a folder, in place of whatever stands there."""
    from qpeft.adapters._folder import CONFIG, FILES

    if output.exists():
        if not (output / CONFIG).is_file():
            raise StateError(f"{output} exists and is no adapter folder")
        check_replaced(output, "an adapter", FILES)


def check_replaced(output: Path, what: str, files: Collection[str]) -> None:
    """Raise StateError unless all that stands in a folder is part of what is replaced as a whole."""
    if others := sorted({path.name for path in output.iterdir()} - set(files)):
        raise StateError(f"{output} holds {others[0]!r}, which is no part of {what}; move it elsewhere first")
