"""Serve rerankers over HTTP, in the dialects of Cohere, Jina, vLLM, TEI and infinity.

The model alone is served under its name, and every adapter of --adapters as BASE:NAME. A request chooses by `model`;
all share one frozen model and its batches. For tiny-lm the embedded adapters are served too.

    curl http://127.0.0.1:8080/v1/rerank -H 'Content-Type: application/json'
      -d '{"query": "why is the sky blue", "documents": ["Air scatters short waves more.", "The sea is salty."]}'

GET /health says that the server lives, /ready that it takes requests; /docs describes the routes, /metrics is for
Prometheus. After SIGTERM, or Ctrl-C, accepted requests are answered and new ones refused.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qpeft.errors import MissingDependencyError, OptionError
from qpeft.model_config import ModelConfig
from qpeft.server.settings import Settings as Config

if TYPE_CHECKING:  # so that options can be listed without importing torch
    from qpeft.lm.pretrained import PretrainedLM


def run(config: Config, model: ModelConfig) -> None:
    """Serve until SIGTERM or Ctrl-C."""
    try:
        import fastapi  # noqa: F401
        import fastapi_offline  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(error.name or "fastapi", "server") from error
    from qpeft import memory
    from qpeft.server.app import create_app
    from qpeft.server.guard import read_keys
    from qpeft.server.logs import on_stderr
    from qpeft.server.run import serve

    if config.adapters is not None:
        try:
            os.listdir(config.adapters)
        except OSError as error:
            raise OptionError(f"--adapters {config.adapters}: {error.strerror}") from error
    keys = read_keys(config.api_key_file)
    memory.share_one_heap()
    with on_stderr():
        serve(create_app(config, functools.partial(_open, model), keys), config, _announce)


def _open(model: ModelConfig) -> PretrainedLM:
    from transformers.utils import logging

    from qpeft.loading import load_lm

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # standard error is for JSON lines
    return load_lm(model)


def _announce(url: str, models: Sequence[str]) -> None:
    print(f"{url} serves {', '.join(models)}", flush=True)
