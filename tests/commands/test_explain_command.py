import json

import pytest

from qpeft.adapters._folder import save_adapter
from qpeft.cli import main
from qpeft.loading import load_lm
from qpeft.model_config import ModelConfig
from qpeft.template import load_template
from tiny_adapters import build

TEXTS = ["--query", "why is the sky blue?", "--passage", "The light of [red] the sky", "--passage", "the sea is salty"]


@pytest.fixture
def options(saved_model, tmp_path):
    """Return a function that saves an adapter of a name and makes the options of a call."""
    model = ["--model", str(saved_model), "--dtype", "float32"]

    def make(name=None):
        if name is None:
            return [*model, *TEXTS]
        lm = load_lm(ModelConfig(str(saved_model), dtype="float32"))
        folder = tmp_path / name
        save_adapter(folder, name, build(name, lm, trained=True), lm, load_template("plain"))
        return [*model, *TEXTS, "--adapter", str(folder)]

    return make


@pytest.mark.parametrize("name", [None, "qpeft_r", "qpeft_a", "soft_prompt"])
def test_tables_and_page(options, tmp_path, capsys, name):
    page = tmp_path / "pages" / "out.html"
    assert main(["explain", *options(name), "--html", str(page)]) == 0
    out = capsys.readouterr().out
    assert "The light of [red]" in out
    assert "query token" in out
    assert ("moved" in out) == (name is not None)
    assert ("hint" in out) == (name == "qpeft_r")
    assert ("most read" in out) == (name == "qpeft_a")
    assert [path.name for path in page.parent.iterdir()] == ["out.html"]
    assert "why is the sky blue?" in page.read_text(encoding="utf-8")


def test_json_agrees_with_score(options, capsys):
    arguments = options("qpeft_a")
    assert main(["explain", *arguments, "--json", "--attention", "--title", "Sky", "--title", ""]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert main(["score", *arguments, "--title", "Sky", "--title", ""]) == 0
    scored = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for line, expected in zip(lines, scored, strict=True):
        assert line["hinted_score"] == pytest.approx(expected["score"], abs=1e-4)
        assert line["hinted_rank"] == expected["rank"]
        assert (line["query"], line["index"], line["passage"]) == (
            expected["query"],
            expected["index"],
            expected["passage"],
        )
        hinted = [token["hinted"] for token in line["query_tokens"]]
        assert sum(hinted) / len(hinted) == pytest.approx(line["hinted_score"], abs=1e-4)
        assert len(line["attention"][0]) == len(line["passage_tokens"])
    assert lines[0]["title"] == "Sky"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--title", "only one"], "2 passages but 1 titles"),
        (["--template", "plian"], "did you mean 'plain'"),
        (["--max-passage-tokens", "0"], "at least 1"),
        (["--adapter", "nowhere"], "no adapter 'nowhere'; known: tiny-lm-qpeft-a"),
        (["--passage", " "], "passage '2' has no tokens"),
    ],
)
def test_bad_input_is_one_line(options, tmp_path, capsys, more, message):
    page = tmp_path / "out.html"
    assert main(["explain", *options(), *more, "--html", str(page)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("qpeft: error")]
    assert message in line
    assert not page.exists()


def test_an_adapter_of_another_method_is_refused_before_the_model_is_opened(saved_model, tmp_path, capsys):
    lm = load_lm(ModelConfig(str(saved_model), dtype="float32"))
    folder = tmp_path / "a"
    save_adapter(folder, "soft_prompt", build("soft_prompt", lm), lm, load_template("yes_no"), method="yes_no")
    assert main(["explain", "--model", "nowhere", *TEXTS, "--adapter", str(folder)]) == 2
    error = capsys.readouterr().err
    assert "only query likelihood can be explained; the adapter was trained for --method yes_no" in error
