"""The command line: a verb, and options that are the fields of that verb's dataclasses.

Every field becomes a flag (`--limit-queries`), a key of the YAML file behind `--config` (`limit_queries`), and a line
of `--help`, whose text is the field's docstring. A field that is a list may be given several times. A switch is on when
it is given; `--in-batch false` turns one off that is on by default, or in the YAML file.

Exit codes: 0 done, 2 bad input or usage, 130 interrupted.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

from qpeft import adapters, methods
from qpeft.atomic import NO_ROOM
from qpeft.commands._arguments import given
from qpeft.commands._config_file import file_arguments
from qpeft.errors import OptionError, QpeftError, nearest

COMMANDS = {
    "retrieve": "find candidates with a first stage",
    "rerank": "order the candidates of a run with a language model",
    "train": "train an adapter: the language model stays frozen",
    "merge": "add a LoRA adapter to its model's weights",
    "fuse": "merge several runs by reciprocal rank",
    "interpolate": "mix a reranked run with its first stage, the weight chosen on dev",
    "index-cache": "encode a collection's passages ahead",
    "calibrate": "map scores to the probability that a passage is relevant, fitted on dev",
    "score": "score passages for a query, or JSON lines on standard input",
    "explain": "show what an adapter changed in each query token, and which passage words it read",
    "evaluate": "measure runs",
    "compare": "test runs against a baseline, with an HTML report",
    "analyze layers": "silence layers of LoRA adapters: where relevance is learned",
    "analyze projections": "the same by projection: q, k, v, o, gate, up, down",
    "analyze components": "attention against the MLP, trained apart or together",
    "analyze ranks": "LoRA adapters of several ranks",
    "analyze checkpoints": "LoRA adapters over the steps of their training",
    "analyze losses": "LoRA adapters trained with several losses on the same data",
    "data info": "describe a collection",
    "data convert": "turn other formats into a BEIR folder",
    "push": "send an adapter folder to the model hub",
    "pull": "fetch an adapter folder from the model hub",
    "serve": "answer rerank requests over HTTP",
    "doctor": "say what is installed and whether the scorer is right on this machine",
    "demo": "the whole way on the embedded collection",
}

KEPT_KERNELS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256", "LRU_CACHE_CAPACITY": "256"}
"""Torch's libraries compile a kernel for every shape that they meet on a CPU, some .4 MB each, and keep 1,024 by
default in each of two places: memory grows by hundreds of MB before it levels off. Read when torch is imported."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    for name, count in KEPT_KERNELS.items():
        os.environ.setdefault(name, count)
    if not sys.stderr.isatty():  # a log is no place for the bars of those who load weights; read when they are imported
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        code = _dispatch(arguments)
        print(end="", flush=True)  # while what goes wrong can still be told
        return code
    except QpeftError as error:
        print(f"qpeft: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nqpeft: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        _print_no_more()
        return 0
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        _print_no_more()
        print(f"qpeft: error: no room for the output: {error.strerror}", file=sys.stderr)
        return 2


def _print_no_more() -> None:
    """Let go what standard output did not take, as Python would try again at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if arguments[0] == "--version":
        from importlib.metadata import version

        print(version("qpeft"))
        return 0
    module, configs = read(arguments)
    module.run(*configs)
    return 0


def read(arguments: Sequence[str]) -> tuple[ModuleType, list[Any]]:
    """Return the module of a command, which comes first in the arguments, and what its `run` is to be called with.

    Raises:
        OptionError: an unknown command or option, a missing one, or a value of the wrong type.
    """
    name, rest = arguments[0], list(arguments[1:])
    if rest and f"{name} {rest[0]}" in COMMANDS:
        name, rest = f"{name} {rest[0]}", rest[1:]
    if name not in COMMANDS:
        verbs = [verb for verb in COMMANDS if verb.startswith(f"{name} ")]
        raise OptionError(f"{name!r} is followed by one of: {', '.join(verbs)}" if verbs else _unknown(name))
    module = importlib.import_module(f"qpeft.commands.{name.replace(' ', '_').replace('-', '_')}")
    configs = module.configs(rest) if hasattr(module, "configs") else _taken(module.run)
    return module, parse(name, module.__doc__ or "", configs, rest)


def _taken(run: Callable[..., None]) -> tuple[type[Any], ...]:
    """Return the dataclasses that a command's `run` takes, in order."""
    return tuple(hint for name, hint in get_type_hints(run).items() if name != "return")


def _unknown(name: str) -> str:
    return f"unknown command {name!r}{nearest(name, COMMANDS)} (qpeft --help lists them)"


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "usage: qpeft COMMAND [options]",
            "",
            "Rerank search results with language models.",
            "",
            *lines,
            "",
            "qpeft COMMAND --help lists a command's options; --config FILE reads them from YAML.",
        ]
    )


def parse(name: str, description: str, configs: Sequence[type[Any]], arguments: Sequence[str]) -> list[Any]:
    """Return one instance of each dataclass, filled from the arguments.

    Raises:
        OptionError: an unknown option, a missing one, or a value of the wrong type.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # jsonargparse announces its next major version at every start
        from jsonargparse import ArgumentParser

        class Parser(ArgumentParser):  # type: ignore[misc, unused-ignore]
            def error(self, message: str, ex: Exception | None = None) -> NoReturn:
                raise OptionError(_one_line(message, known))

        parser = Parser(prog=f"qpeft {name}", description=description, allow_abbrev=False, default_env=False)
        parser.add_argument("--config", action="config", help="YAML file with options, named as below with _ for -")
        known = ["config"] + [field.name for config in configs for field in dataclasses.fields(config)]
        for config in configs:
            _add_options(parser, config)
        hints = {name: hint for config in configs for name, hint in get_type_hints(config).items()}
        values = parser.parse_args(_parsed(arguments, hints))
    filled = []
    for config in configs:
        names = [field.name for field in dataclasses.fields(config)]
        for name in names:
            if values[name] is None and not _may_be_none(hints[name]):
                raise OptionError(f"--{name.replace('_', '-')} cannot be null")
        filled.append(
            config(**{name: _tuple(values[name]) if _is_list(hints[name]) else values[name] for name in names})
        )
    return filled


def _add_options(parser: Any, config: type[Any]) -> None:
    from docstring_parser import parse_from_object

    # A subclass documents its own fields only, and need not document again those whose defaults it changes.
    texts = {
        param.arg_name: param.description
        for kind in reversed(config.__mro__)
        if dataclasses.is_dataclass(kind)
        for param in parse_from_object(kind).params
        if param.description
    }
    hints = get_type_hints(config)
    group = parser.add_argument_group((config.__doc__ or config.__name__).splitlines()[0].rstrip("."))
    for field in dataclasses.fields(config):
        flag, hint = "--" + field.name.replace("_", "-"), hints[field.name]
        required = field.default is dataclasses.MISSING
        text = " ".join(texts.get(field.name, "").split()).replace("%", "%%")
        for registry in (adapters, methods):
            place = f"[{registry.__name__.rpartition('.')[2]}]"
            if place in text:  # what there is, is read from folders and entry points
                text = text.replace(place, ", ".join(registry.available()))
        options: dict[str, Any] = {"help": text}
        if required:
            options["required"] = True
        else:
            options["default"] = field.default
        if _is_list(hint):
            options["type"] = list[get_args(hint)[0]] | get_args(hint)[0]  # type: ignore[misc]
            options["metavar"] = field.name.upper()
            if not required:
                options["default"] = list(options["default"])
        elif hint is bool:
            options |= {"type": bool, "nargs": "?", "const": True, "metavar": "true|false"}
        else:
            options["type"] = _Text() if hint == str | None else hint
        group.add_argument(flag, **options)


class _Text:
    """A text as it was typed: read as YAML, what stands behind # would be lost, and ~ be nothing. The word null is."""

    def __call__(self, value: object) -> str | None:
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{value!r} is no text; put it in quotes")
        return None if value == "null" else value

    def __repr__(self) -> str:
        return "str | null"


def _may_be_none(hint: Any) -> bool:
    return type(None) in get_args(hint)


def _is_list(hint: Any) -> bool:
    return get_origin(hint) is tuple


def _parsed(arguments: Sequence[str], hints: Mapping[str, Any]) -> list[str]:
    """Return arguments as the parser takes them.

    Files stand first, so that an option that is typed counts, wherever it stands; an option that may be given several
    times stands once, with all its values.
    """
    files: list[str] = []
    rest: list[str] = []
    lists: dict[str, list[str]] = {}
    for option, value, typed in given(arguments):
        if value is not None and option == "config":
            files += file_arguments(value, hints)
        elif value is not None and _is_list(hints.get(option.replace("-", "_"))):
            lists.setdefault(option, []).append(value)
        else:
            rest += typed
    return [*files, *rest, *(f"--{option}={json.dumps(values)}" for option, values in lists.items())]


def _tuple(values: Any) -> Any:
    """Return what was given as a tuple: in YAML, one of several may stand without brackets."""
    return (values,) if isinstance(values, str) else tuple(values)


_NOT = {
    "<class 'int'>": "is no whole number",
    "<class 'float'>": "is no number",
    "<class 'bool'>": "is neither true nor false",
}


def _one_line(message: str, known: Sequence[str]) -> str:
    """Fold the parser's message into one line, and offer the nearest option for an unknown one."""
    text = " ".join(message.split())
    if alone := re.match(r"[Uu]nrecognized arguments: (?!-)(\S+)", text):
        quoted = "texts with blanks are put in quotes, and an option that takes several is given several times"
        return f"{alone[1]!r} stands alone: {quoted}"
    unknown = re.search(r"(?:[Uu]nrecognized arguments:|Key|key|Option) [\"']?-{0,2}([\w-]+)", text)
    if unknown and unknown.group(1).replace("-", "_") not in known:
        word = unknown.group(1).replace("-", "_")
        offer = nearest(word, known) if "did you mean" in nearest(word, known) else ""
        return f"unknown option --{unknown.group(1).replace('_', '-')}{offer.replace('_', '-')}"
    if missing := re.match(r"argument (--[\w-]+).*: expected one argument", text):
        return f"{missing[1]} has no value; one that begins with dashes is written behind it with ="
    if wrong := re.match(r'Parser key "(\w+)": Expected an? (.+?)\. Got value: (.*)', text):
        option, kind, value = wrong.groups()
        choices = re.findall(r"'([^']*)'", kind) if "Literal" in kind else []
        why = f"is none of {', '.join(choices)}" if choices else _NOT.get(kind)
        if why is not None:
            return f"--{option.replace('_', '-')}: {value!r} {why}"
    return text
