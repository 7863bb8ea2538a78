"""A server in a process of its own, which clients reach over the loopback device."""

import functools
import gc
import math
import os
import subprocess
import sys
import warnings

import pytest

from mini_candidates import mini_candidates
from qpeft import Reranker


@pytest.fixture(scope="session")
def key():
    """Return the server's key."""
    return "secret"


@pytest.fixture(scope="session")
def url(tmp_path_factory, key):
    """Return the URL of `qpeft serve` with tiny-lm and one key."""
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(f"# for tests\n{key}\n")
    arguments = ["--model", "tiny-lm", "--dtype", "float32", "--device", "cpu", "--port", "0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "qpeft", "serve", *arguments, "--api-key-file", str(keys)],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    with process:
        try:
            address, _, models = process.stdout.readline().partition(" serves ")
            assert "tiny-lm" in models, "the server did not start"
            yield address
        finally:
            process.terminate()
    assert process.returncode == 0


@pytest.fixture(scope="session")
def asked():
    """Return a query and its documents, from the embedded collection."""
    item = mini_candidates()[0]
    return item.query.text, [passage.text for passage in item.passages]


@pytest.fixture(scope="session")
def offline(asked):
    """Return a function: an adapter's name → (position, probability per query token) of the documents, best first."""

    @functools.cache
    def rank(adapter):
        reranker = Reranker.from_pretrained("tiny-lm", adapter=adapter, dtype="float32", device="cpu")
        return [(entry["corpus_id"], math.exp(entry["score"])) for entry in reranker.rank(*asked)]

    return rank


@pytest.fixture(autouse=True)
def unclosed_connections():
    """Collect what clients leave open, and their warnings with it, before another test is blamed for them."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()
