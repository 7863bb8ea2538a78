import json
import os
import subprocess
import sys

import pytest

from qpeft.cli import main

SUBJECTS = {
    "sky": ["the sky is blue", "the light of the sky", "the red sky over the old city"],
    "sea": ["the sea is salty", "the tide of the sea", "the long sea and the moon"],
    "octopus": ["the octopus has three heart", "an octopus is in the sea", "the old octopus and the cat"],
    "king": ["the old king of the city", "the new king made a lake", "the king and the lion"],
}
QUERIES = {
    "q1": ("why is the sky blue?", "sky-0"),
    "q2": ("who made the lake", "king-1"),
    "q3": ("three heart octopus", "octopus-0"),
    "q4": ("why is the sea salty?", "sea-0"),
    "q5": ("the tide", "sea-1"),
    "q6": ("red sky", "sky-2"),
}


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """Return a BEIR folder of 12 passages and 6 queries, with splits dev and test that judge the same queries."""
    folder = tmp_path_factory.mktemp("toy")
    passages = [(f"{name}-{i}", name, text) for name, texts in SUBJECTS.items() for i, text in enumerate(texts)]
    lines = [json.dumps({"_id": p, "title": title, "text": text}) for p, title, text in passages]
    (folder / "corpus.jsonl").write_text("\n".join(lines) + "\n")
    lines = [json.dumps({"_id": q, "text": text, "answers": ["the"]}) for q, (text, _) in QUERIES.items()]
    (folder / "queries.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "qrels").mkdir()
    for split in ("dev", "test"):
        rows = "".join(f"{q}\t{passage}\t1\n" for q, (_, passage) in QUERIES.items())
        (folder / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + rows)
    return folder


@pytest.fixture(scope="session")
def toy_run(toy, tmp_path_factory):
    """Return a BM25 run over the toy collection."""
    path = tmp_path_factory.mktemp("runs") / "bm25.trec"
    assert main(["retrieve", "--collection", str(toy), "--output", str(path), "--depth", "8", "--stopwords="]) == 0
    return path


@pytest.fixture
def rerank_arguments(toy, toy_run, saved_model):
    """Return a function that makes the arguments of a rerank command."""

    def arguments(output, *more, run=None):
        return [
            "rerank", "--collection", str(toy), "--run", str(run or toy_run), "--output", str(output),
            "--model", str(saved_model), "--dtype", "float32", *more,
        ]  # fmt: skip

    return arguments


@pytest.fixture
def start_process():
    """Return a function that runs the command line in a process of its own."""

    def start(arguments, **options):
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        return subprocess.Popen([sys.executable, "-m", "qpeft", *arguments], env=environment, **options)

    return start
