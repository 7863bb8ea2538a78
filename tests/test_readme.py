"""The commands of the README and of docs/serving.md parse, and its Python runs (clients: clients/test_docs.py)."""

import re
import shlex
from pathlib import Path

import pytest

from qpeft.cli import COMMANDS, parse

README = Path(__file__).parents[1] / "README.md"
TEXT = README.read_text(encoding="utf-8") if README.exists() else ""
SERVING = README.parent / "docs" / "serving.md"
SHELL = re.findall(r"```sh\n(.*?)```", TEXT + (SERVING.read_text(encoding="utf-8") if SERVING.exists() else ""), re.S)
LINES = re.findall(r"^(?:[A-Z_]+=\S+ )?(qpeft .*?)(?: +#.*)?$", "\n".join(SHELL), re.M)


def test_there_is_something_to_test():
    assert len(LINES) >= 5


@pytest.mark.parametrize("line", LINES)
def test_commands_parse(line):
    import importlib

    words = shlex.split(line)[1:]
    name = next(verb for verb in COMMANDS if words[: len(verb.split())] == verb.split())
    module = importlib.import_module(f"qpeft.commands.{name.replace(' ', '_')}")
    arguments = words[len(name.split()) :]
    configs = module.configs(arguments) if hasattr(module, "configs") else (module.Config,)
    assert len(parse(name, "", configs, arguments)) == len(configs)


def test_the_python_snippet_runs(capsys):
    (snippet,) = (code for code in re.findall(r"```python\n(.*?)```", TEXT, re.S) if "http://" not in code)
    exec(compile(snippet, "README.md", "exec"), {})
    assert len(capsys.readouterr().out.splitlines()) == 2
