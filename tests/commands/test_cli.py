"""Options on the command line and in YAML files."""

import pytest

from qpeft.cli import main, parse
from qpeft.commands import train
from qpeft.errors import OptionError
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
