"""The commands of the README and of docs/ parse, and its snippets run (clients: clients/test_docs.py)."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from qpeft.cli import read

README = Path(__file__).parents[1] / "README.md"
TEXT = README.read_text(encoding="utf-8") if README.exists() else ""
DOCS = "".join(page.read_text(encoding="utf-8") for page in sorted((README.parent / "docs").glob("*.md")))
SHELL = re.findall(r"```sh\n(.*?)```", TEXT + DOCS, re.S)
LINES = re.findall(r"^(?:[A-Z_]+=\S+ |for .*; do )?(qpeft .*?)(?: +#.*|; done)?$", "\n".join(SHELL), re.M)


def test_there_is_something_to_test():
    assert len(LINES) >= 30


@pytest.mark.parametrize("line", LINES)
def test_commands_parse(line):
    _, configs = read(shlex.split(line.replace("$s", "1"))[1:])
    assert configs


def test_the_python_snippet_runs(capsys):
    (snippet,) = (code for code in re.findall(r"```python\n(.*?)```", TEXT, re.S) if "http://" not in code)
    exec(compile(snippet, "README.md", "exec"), {})
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_the_page_on_python_runs(tmp_path, monkeypatch, capsys):
    page = (README.parent / "docs" / "python.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.S)
    assert len(blocks) == 5
    monkeypatch.chdir(tmp_path)
    exec(compile("\n".join(blocks), "python.md", "exec"), {})
    said = capsys.readouterr().out
    assert all(f"{run} {measure} " in said for run in ("bm25", "trained") for measure in ("nDCG@10", "RR@10"))
    for adapter in ("my-adapter", "own-adapter"):
        assert (tmp_path / adapter / "adapter_model.safetensors").is_file()


@pytest.mark.skipif(not (Path(sys.prefix) / "bin" / "activate").exists(), reason="not in a virtual environment")
def test_the_training_snippet_runs_as_written(tmp_path):
    (snippet,) = (block for block in SHELL if "--train-file" in block)
    assert len(snippet.splitlines()) == 7
    (tmp_path / ".venv").symlink_to(sys.prefix)
    # No qpeft is on this path: the snippet must find its own.
    environment = {**os.environ, "PATH": os.defpath, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["/bin/sh", "-e"], input=snippet, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "my-adapter" / "adapter_model.safetensors").is_file()
    ranked = [json.loads(line) for line in done.stdout.splitlines() if '"rank"' in line]
    assert sorted(each["rank"] for each in ranked) == [1, 2]
    assert {each["passage"] for each in ranked} == {"The moon pulls.", "It is salty."}
