"""The snippets of docs/integrations.md, and the README's of clients, run as they stand, at a real server's address."""

import importlib
import json
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from qpeft.cli import read

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "integrations.md").read_text(encoding="utf-8")
SECTIONS = re.findall(r"^### (.*?)\n(.*?)(?=^##|\Z)", TEXT, re.M | re.S)
SNIPPETS = {title: snippet for title, body in SECTIONS for snippet in re.findall(r"```python\n(.*?)```", body, re.S)}
README = (ROOT / "README.md").read_text(encoding="utf-8")
ADDRESS = "http://127.0.0.1:8080"
ANSWERS = {"mteb": "my-team/tiny-lm\n", "huggingface_hub": "True tiny-lm\n"}

pytestmark = pytest.mark.filterwarnings(
    "ignore:unclosed:ResourceWarning", "ignore:The inplace keyword:pandas.errors.Pandas4Warning"
)


def test_every_snippet_is_found():
    assert len(SNIPPETS) == TEXT.count("```python") >= 13


@pytest.mark.parametrize("title", SNIPPETS)
def test_snippets_run(title, url, capsys):
    code = SNIPPETS[title].replace(ADDRESS, url)
    assert (url in code) == (TEXT.index(f"### {title}\n") > TEXT.index("## Over HTTP"))
    exec(compile(code, f"integrations.md: {title}", "exec"), {})
    printed = capsys.readouterr().out
    if title in ANSWERS:
        assert printed == ANSWERS[title]
    else:
        assert printed.startswith("Rivers carry minerals")


@pytest.mark.parametrize("client", ["cohere", "langchain_cohere"])
def test_the_clients_of_the_readme_get_an_answer(client, url, capsys):
    snippets = re.findall(r"```python\n(.*?)```", README, re.S)
    (code,) = (code for code in snippets if re.search(rf"^(from|import) {client}\b", code, re.M))
    exec(compile(code.replace(ADDRESS, url), "README.md", "exec"), {})
    assert "Air scatters" in capsys.readouterr().out.splitlines()[0]


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_readmes_curl_gets_an_answer(url):
    (command,) = re.findall(r"^curl .*?\}'$", README, re.M | re.S)
    words = shlex.split(command.replace(ADDRESS, url))
    answer = json.loads(subprocess.run([*words, "--silent", "--noproxy", "*"], capture_output=True, check=True).stdout)
    assert [result["index"] for result in answer["results"]] == [1, 0]


def test_commands_and_extras_exist():
    (line,) = re.findall(r"^qpeft serve .*$", TEXT, re.M)
    _, configs = read(shlex.split(line)[1:])
    assert len(configs) == 2
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(re.findall(r"qpeft\[(.*?)\]", TEXT)) <= set(extras)
    for module, name in re.findall(r"\| `(\w+)\.(\w+)` \|", TEXT):
        assert hasattr(importlib.import_module(f"qpeft.integrations.{module}"), name)
