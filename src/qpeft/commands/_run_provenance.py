"""What stands beside a run about how it was made."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qpeft.data.records import read_json
from qpeft.errors import FormatError, InputError, OptionError
from qpeft.provenance import input_fingerprint, provenance_path


def read_run_provenance(run: str) -> dict[str, Any] | None:
    """Return the provenance beside a run file; None where there is none.

    Raises:
        FormatError: the file is no provenance.
        InputError: it is that of another run, or of this one as it was before.
    """
    beside = provenance_path(Path(run))
    if not beside.is_file():
        return None
    facts = read_json(beside)
    if not isinstance(facts, dict) or not isinstance(facts.get("options"), dict):
        raise FormatError(beside, None, "not provenance of a run")
    then, now = (facts.get("output") or {}).get("sha256"), input_fingerprint(run)
    if then is not None and now is not None and then != now:
        raise InputError(f"{beside} is not of {run} as it is now; delete it if the run was changed on purpose")
    return facts


def scored_depth(run: str, facts: Mapping[str, Any] | None) -> int | None:
    """Return how many of each query's first passages have scores of their own; None: all, as far as is known.

    What stands below them in a run carries the first stage's order on, with scores that only keep it.

    Args:
        run: its name, for the message.
        facts: its provenance, if there is one.

    Raises:
        OptionError: even some of the first ones have none.
    """
    if facts is None or facts.get("command") not in ("rerank", "interpolate"):
        return None
    if facts["options"].get("method") == "cascade":
        raise OptionError(f"{run} was made with --method cascade, which scores the best candidates only")
    depth = facts["options"].get("depth")
    return depth if isinstance(depth, int) else None
