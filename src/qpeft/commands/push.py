"""Send an adapter folder to the model hub; the repository is made if it is missing.

Who you are comes from `hf auth login` or the environment variable HF_TOKEN. The model card and the provenance, options
and paths included, are sent along.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from qpeft.commands._hub import reaching
from qpeft.errors import AdapterError


@dataclass(frozen=True)
class Config:
    """What goes where."""

    folder: str
    """The adapter folder."""
    repo: str
    """Repository on the model hub, user/name."""
    private: bool = False
    """Make a new repository private."""
    revision: str | None = None
    """Branch; made if it is missing. By default the main one."""


def run(config: Config) -> None:
    """Check and send.

    Raises:
        AdapterError: the folder holds no adapter.
        ModelError: the hub cannot be reached, or refuses.
    """
    from huggingface_hub import HfApi

    from qpeft.adapters._folder import FILES, WEIGHTS, read_config

    folder = Path(config.folder)
    described = read_config(folder)
    if not (folder / WEIGHTS).is_file():
        raise AdapterError(f"no adapter in {config.folder!r}: {WEIGHTS} is missing")
    with reaching(config.repo):
        api = HfApi()
        api.create_repo(config.repo, private=config.private or None, exist_ok=True)
        if config.revision is not None:
            api.create_branch(config.repo, branch=config.revision, exist_ok=True)
        sent = api.upload_folder(
            repo_id=config.repo,
            folder_path=folder,
            revision=config.revision,
            allow_patterns=list(FILES),
            delete_patterns=[name for name in FILES if not (folder / name).exists()],
            commit_message=f"{described['adapter']} for {described['base_model_name_or_path']}",
        )
    print(f"{sent.commit_url} is {config.folder}", file=sys.stderr)
