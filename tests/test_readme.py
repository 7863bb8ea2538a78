"""The README's commands parse and its Python runs."""

import re
import shlex
from pathlib import Path

import pytest

from qpeft.cli import COMMANDS, parse

README = Path(__file__).parents[1] / "README.md"
TEXT = README.read_text(encoding="utf-8") if README.exists() else ""
LINES = re.findall(r"^qpeft .*$", "\n".join(re.findall(r"```sh\n(.*?)```", TEXT, re.S)), re.M)


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
    (snippet,) = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    exec(compile(snippet, "README.md", "exec"), {})
    assert len(capsys.readouterr().out.splitlines()) == 2
