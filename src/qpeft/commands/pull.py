"""Fetch an adapter folder from the model hub, for --adapter. Nothing but an adapter's own files is fetched."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from qpeft.atomic import replacing_folder
from qpeft.commands._hub import reaching
from qpeft.commands._output import check_adapter_folder
from qpeft.errors import AdapterError


@dataclass(frozen=True)
class Config:
    """What comes from where."""

    repo: str
    """Repository on the model hub, user/name."""
    output: str
    """The adapter folder to make."""
    revision: str | None = None
    """Branch, tag or commit; by default the main branch."""


def run(config: Config) -> None:
    """Fetch, check, move into place.

    Raises:
        StateError: the output exists and is something else.
        AdapterError: the repository holds no adapter of qpeft.
        ModelError: the hub cannot be reached, or knows no such repository or revision.
    """
    from huggingface_hub import snapshot_download

    from qpeft.adapters._folder import CONFIG, FACTS, FILES, WEIGHTS, read_config

    output = Path(config.output)
    check_adapter_folder(output)
    with replacing_folder(output) as temporary:
        # The small files first: other repositories may be large.
        for some in ([CONFIG, FACTS], list(FILES)):
            with reaching(config.repo):
                snapshot_download(
                    config.repo, revision=config.revision, local_dir=temporary, allow_patterns=some, max_workers=1
                )
            try:
                described = read_config(temporary)
            except AdapterError as error:
                reason = str(error).replace(str(temporary), "").partition(": ")[2]
                raise AdapterError(f"no adapter in {config.repo!r} on the model hub: {reason}") from error
        if not (temporary / WEIGHTS).is_file():
            raise AdapterError(f"no adapter in {config.repo!r} on the model hub: {WEIGHTS} is missing")
        shutil.rmtree(temporary / ".cache", ignore_errors=True)
    print(f"{output}: {described['adapter']} for {described['base_model_name_or_path']}", file=sys.stderr)
