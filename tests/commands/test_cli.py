"""Options on the command line and in YAML files."""

import json
import os
import subprocess

import pytest

from qpeft.cli import main, parse, read
from qpeft.commands import evaluate, score, train
from qpeft.commands._judgements import Judging, Shown
from qpeft.errors import FormatError, InputError, OptionError
from qpeft.training.config import Authors, TrainingConfig


@pytest.mark.parametrize(
    ("kind", "arguments", "expected"),
    [
        (Authors, [], True),
        (Authors, ["--in-batch", "false"], False),
        (Authors, ["--in_batch=no"], False),
        (Authors, ["--in-batch", "--epochs", "3"], True),
        (TrainingConfig, [], False),
        (TrainingConfig, ["--in-batch"], True),
        (TrainingConfig, ["--epochs", "3", "--in-batch", "true"], True),
    ],
)
def test_switches(kind, arguments, expected):
    (config,) = parse("train", "", [kind], arguments)
    assert config.in_batch is expected


def test_switches_of_a_file_can_be_turned_back(tmp_path):
    path = tmp_path / "options.yaml"
    path.write_text("in_batch: true\nepochs: 2\n")
    for more, expected in ((), True), (("--in-batch", "false"), False):
        (config,) = parse("train", "", [TrainingConfig], ["--config", str(path), *more])
        assert (config.in_batch, config.epochs) == (expected, 2)


def test_what_is_no_switch():
    with pytest.raises(OptionError, match=r"resume.*maybe"):
        parse("train", "", [train.Config], ["--output", "mine", "--resume", "maybe"])


def test_help_tells_how_to_turn_a_switch_off(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["train", "--adapter", "qpeft_r", "--preset", "authors", "--help"])
    assert ended.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("--in-batch [true|false]" in line for line in lines)


@pytest.mark.parametrize(
    ("text", "arguments", "expected"),
    [
        ("", ["--run", "a", "--run=b [c]"], ("a", "b [c]")),
        ("run: [a, b]\n", [], ("a", "b")),
        ("run: bm25.trec\n", [], ("bm25.trec",)),
        ("run: [a, b]\n", ["--run", "['c']"], ("['c']",)),
        ("", ["--run=1", "--run", "null", "--run", "--not an option"], ("1", "null", "--not an option")),
    ],
)
def test_options_that_may_be_given_several_times(text, arguments, expected, tmp_path):
    path = tmp_path / "options.yaml"
    path.write_text(f"collection: mini\n{text}")
    _, config = parse("evaluate", "", [Judging, evaluate.Config], ["--config", str(path), *arguments])
    assert config.run == expected


def test_a_missing_value_of_such_an_option():
    with pytest.raises(OptionError, match="--run has no value"):
        parse("evaluate", "", [Judging, evaluate.Config], ["--run", "--collection", "mini"])


def test_texts_that_begin_with_dashes_stay_as_they_are():
    arguments = ["--query", "dry run", "--passage", "--dry_run is a_flag of x_y=3"]
    (config,) = parse("score", "", [score.Config], arguments)
    assert config.passage == ("--dry_run is a_flag of x_y=3",)


@pytest.mark.parametrize(("given", "expected"), [("#metoo", "#metoo"), ("~", "~"), ("7", "7"), ("null", None)])
def test_texts_are_taken_as_they_are_typed(given, expected, tmp_path):
    (config,) = parse("score", "", [score.Config], ["--query", given])
    assert config.query == expected
    path = tmp_path / "options.yaml"
    path.write_text(json.dumps({"query": None if given == "null" else given}))
    (config,) = parse("score", "", [score.Config], ["--config", str(path)])
    assert config.query == expected


def test_a_file_must_say_that_a_text_is_one(tmp_path):
    path = tmp_path / "options.yaml"
    path.write_text("query: 7\n")
    with pytest.raises(OptionError, match="7 is no text; put it in quotes"):
        parse("score", "", [score.Config], ["--config", str(path)])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("dtype: null\ndepth: 3\n", "--dtype cannot be null"),
        ("seed: null\n", "seed"),
        ("a: [\n", "options.yaml:2: "),
        ("compile: no\n", "options.yaml: compile: put yes and no in quotes"),
        ("just a text\n", "options.yaml: holds no options"),
    ],
)
def test_files_that_are_misread_elsewhere(text, words, tmp_path):
    path = tmp_path / "options.yaml"
    path.write_text(text)
    with pytest.raises((OptionError, FormatError), match=words):
        read(["rerank", "--collection", "mini", "--run", "r", "--output", "o", "--config", str(path)])
    with pytest.raises(InputError, match="nowhere: No such file"):
        read(["rerank", "--config", str(tmp_path / "nowhere")])


def test_options_from_a_pipe_are_refused_and_not_lost():
    reading, writing = os.pipe()
    os.write(writing, b"depth: 3\n")
    os.close(writing)
    with pytest.raises(InputError, match=f"--config /dev/fd/{reading}: is a pipe"):
        read(["retrieve", "--collection", "mini", "--output", "o", "--config", f"/dev/fd/{reading}"])
    os.close(reading)


def test_standard_output_without_room_ends_in_one_line(start_process):
    with open("/dev/full", "w") as full:
        process = start_process(
            ["data", "info", "--collection", "mini"], stdout=full, stderr=subprocess.PIPE, text=True
        )
        said = process.communicate()[1]
    assert said == "qpeft: error: no room for the output: No space left on device\n"
    assert process.returncode == 2


@pytest.mark.parametrize("text", ["", "# a comment\n", "max_length:\n", 'compile: "no"\n', "\ufefflimit_queries: 3\n"])
def test_files_that_say_little(text, tmp_path):
    path = tmp_path / "options.yaml"
    path.write_text(text, encoding="utf-8")
    arguments = ["rerank", "--collection", "mini", "--run", "r", "--output", "o", "--config", str(path)]
    _, (config, model, _) = read(arguments)
    assert config.limit_queries == (3 if "limit" in text else None)
    assert model.compile == ("no" if "compile" in text else "auto")
    assert model.max_length is None


def test_a_null_of_a_file_turns_off_what_is_on(tmp_path):
    path = tmp_path / "options.yaml"
    path.write_text("dev_split:\n")
    _, (config, *_) = read(["train", "--collection", "mini", "--output", "o", "--config", str(path)])
    assert config.dev_split is None


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["evaluate", "--collection", "mini", "--run", "b.trec", "y.trec"], "'y.trec' stands alone"),
        (["score", "--query", "why", "is", "--passage", "x"], "'is' stands alone"),
        (["pull", "nosuch"], "'nosuch' stands alone"),
        (["score", "-q", "why"], "unknown option --q"),
    ],
)
def test_words_without_an_option(arguments, word):
    with pytest.raises(OptionError, match=word):
        read(arguments)


def test_the_last_of_several_files_that_says_it_counts(tmp_path):
    for name, text in (("a", "first_stage: dense\n"), ("b", "first_stage: dense\n"), ("c", "depth: 3\n")):
        (tmp_path / name).write_text(text)
    arguments = ["--collection", "mini", "--output", "o"]
    for names in ("c", "a", "ac", "ca"):
        files = [word for name in names for word in ("--config", str(tmp_path / name))]
        _, (_, stage) = read(["retrieve", *arguments, *files])
        assert hasattr(stage, "encode_batch") == ("a" in names)


@pytest.mark.parametrize("given", [["--first_stage", "dense"], ["--first-stage=bm25", "--first-stage", "dense"], None])
def test_options_that_decide_on_others_may_be_spelt_and_given_as_any(given, tmp_path, capsys):
    path = tmp_path / "options.yaml"
    path.write_text("first_stage: dense\n")
    with pytest.raises(SystemExit):
        main(["retrieve", *(given or ["--config", str(path)]), "--help"])
    assert "--encode-batch" in capsys.readouterr().out


def test_options_can_be_printed_as_a_file_that_is_read_again(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["evaluate", "--collection", "mini", "--run", "a", "--run", "b", "--print_config"])
    path = tmp_path / "options.yaml"
    path.write_text(capsys.readouterr().out)
    _, configs = read(["evaluate", "--config", str(path)])
    assert configs == [Judging(collection="mini"), evaluate.Config(run=("a", "b")), Shown()]
