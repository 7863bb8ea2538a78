"""Training of the methods that read the last token, from the command line."""

import itertools
import json
import math
import sys

import pytest
import torch
from safetensors.torch import load_file
from test_bad_input import fails
from test_train import GROUPS, interrupt

from qpeft import methods
from qpeft.adapters._folder import WEIGHTS, read_config
from qpeft.cli import main
from qpeft.data.trec import read_run
from qpeft.loading import load_lm
from qpeft.model_config import ModelConfig
from qpeft.types import Reranker
from tiny_adapters import PASSAGES, QUERIES

METHODS = ["classifier", "yes_no", "query_likelihood"]


@pytest.fixture
def arguments(toy, saved_model, tmp_path):
    """Return a function that makes the arguments of a training of six steps."""
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(group) + "\n" for group in GROUPS))

    def make(output, *more, method="classifier"):
        return [
            "train", "--output", str(output), "--train-file", str(path), "--collection", str(toy), "--method", method,
            "--adapter", "lora", "--r", "2", "--model", str(saved_model), "--dtype", "float32", "--batch-queries", "1",
            "--epochs", "2", "--negatives", "1", "--evaluations", "3", "--dev-depth", "6", "--learning-rate", "0.01",
            *more,
        ]  # fmt: skip

    return make


@pytest.mark.parametrize("method", METHODS)
def test_a_trained_reranker_ranks(method, arguments, rerank_arguments, saved_model, tmp_path, capsys):
    output = tmp_path / "mine"
    assert main(arguments(output, "--max-passage-tokens", "9", method=method)) == 0
    said = capsys.readouterr().err
    assert ("zero-shot " in said) == (method != "classifier")
    described = read_config(output)
    template = {"classifier": "rankllama", "yes_no": "yes_no", "query_likelihood": "plain"}[method]
    assert (described["method"], described["template"]["name"]) == (method, template)
    tensors = load_file(output / WEIGHTS)
    assert ("base_model.model.score.weight" in tensors) == described["head"] == (method == "classifier")
    assert any(tensor.abs().max() > 0 for name, tensor in tensors.items() if "lora_B" in name)
    facts = json.loads((output / "provenance.json").read_text())
    assert facts["training"]["steps"] == 6
    assert 0 < facts["dev"]["trained"] <= 1
    assert facts["options"]["loss"] == ("both" if method == "query_likelihood" else "softmax")

    command = rerank_arguments(tmp_path / "mine.trec", "--adapter", str(output))
    assert main(command) == 0
    assert json.loads((tmp_path / "mine.trec.provenance.json").read_text())["options"]["method"] == method
    run = read_run(tmp_path / "mine.trec")
    lm = load_lm(ModelConfig(str(saved_model), dtype="float32"))
    scorer = methods.open_scorer(lm, output)
    assert scorer.prompt.max_passage_tokens == 9
    assert len({hit.score for ranking in run.values() for hit in ranking.hits}) > 10
    capsys.readouterr()
    assert main(["score", "--model", str(saved_model), "--adapter", str(output), "--query", "a", "--passage", "b"]) == 0
    assert json.loads(capsys.readouterr().out)["score"] == pytest.approx(
        Reranker.from_pretrained(str(saved_model), adapter=output).predict([("a", "b")])[0], abs=1e-4
    )
    other = "yes_no" if method == "classifier" else "classifier"
    assert main([*command, "--method", other]) == 2
    assert f"--method {other}: adapter {str(output)!r} was trained for --method {method}" in capsys.readouterr().err


def test_answers_of_ones_own(arguments, tmp_path):
    assert main(arguments(tmp_path / "mine", "--yes", "blue", "--no", "red", method="yes_no")) == 0
    assert read_config(tmp_path / "mine")["method_options"] == {"yes": "blue", "no": "red"}


@pytest.mark.parametrize("more", [("--dropout", "0.2"), ("--gradient-checkpointing", "--gradient-accumulation", "2")])
@pytest.mark.parametrize("method", ["classifier", "yes_no"])
def test_an_interrupted_training_resumes_to_the_same_bytes(method, arguments, tmp_path, monkeypatch, capsys, more):
    whole, output = tmp_path / "whole", tmp_path / "mine"
    more = (*more, "--keep-every", "1")
    assert main(arguments(whole, *more, method=method)) == 0
    with monkeypatch.context() as patch:
        interrupt(patch, after=5)
        assert main(arguments(output, *more, method=method)) == 130
    assert main(arguments(output, *more, "--resume", method=method)) == 0
    assert (output / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    facts = [json.loads((folder / "provenance.json").read_text()) for folder in (output, whole)]
    assert facts[0]["history"] == facts[1]["history"]
    assert facts[0]["dev"] == facts[1]["dev"]
    kept = [sorted(folder.rglob(WEIGHTS)) for folder in (tmp_path / "mine.steps", tmp_path / "whole.steps")]
    assert len(kept[0]) == len(kept[1]) == facts[0]["training"]["steps"] + 1
    assert all(one.read_bytes() == other.read_bytes() for one, other in zip(*kept, strict=True))


def test_steps_are_kept_as_adapters(arguments, saved_model, tmp_path, capsys):
    output, steps = tmp_path / "mine", tmp_path / "mine.steps"
    assert main(arguments(output, "--keep-every", "2", "--scheduler", "constant")) == 0
    assert [path.name for path in sorted(steps.glob("step-*"))] == [f"step-{n:06d}" for n in (0, 2, 4, 6)]
    assert [json.loads((p / "provenance.json").read_text())["training"] for p in sorted(steps.glob("step-*"))] == [
        {"steps": n} for n in (0, 2, 4, 6)
    ]
    weights = [load_file(path / WEIGHTS) for path in sorted(steps.glob("step-*"))]
    assert all(tensor.abs().max() == 0 for name, tensor in weights[0].items() if "lora_B" in name), "untrained"
    assert weights[0]["base_model.model.score.weight"].abs().max() > 0
    pairs = [(query, passage) for query in QUERIES for passage in PASSAGES]
    scores = []
    for path in sorted(steps.glob("step-*")):
        lm = load_lm(ModelConfig(str(saved_model), dtype="float32"))
        scores.append(methods.open_scorer(lm, path).score(pairs))
    assert len({tuple(each) for each in scores}) == 4
    assert main(arguments(output, "--keep-every", "2", "--scheduler", "constant")) == 0, "the same again"
    capsys.readouterr()
    assert main(arguments(output, "--keep-every", "3")) == 2
    assert (
        "mine.steps was made with other options, data or model (--keep-every was 2 and is 3" in capsys.readouterr().err
    )


@pytest.mark.parametrize("method", METHODS)
def test_gradient_checkpointing_changes_nothing(method, arguments, tmp_path):
    for name, more in (("plain", ()), ("again", ("--gradient-checkpointing",))):
        assert main(arguments(tmp_path / name, *more, method=method)) == 0
    one, other = (load_file(tmp_path / name / WEIGHTS) for name in ("plain", "again"))
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("method", "loss"),
    [*itertools.product(["classifier", "yes_no"], ["softmax", "cross_entropy", "ranknet", "pair"]), ("yes_no", "sft")],
)
def test_losses(loss, method, arguments, tmp_path):
    assert main(arguments(tmp_path / "mine", "--loss", loss, method=method)) == 0
    facts = json.loads((tmp_path / "mine" / "provenance.json").read_text())
    assert facts["options"]["loss"] == loss
    seen = [entry["loss"] for entry in facts["history"] if "loss" in entry]
    assert min(seen) >= 0
    assert max(seen) > 0


@pytest.mark.parametrize(
    ("method", "more", "words"),
    [
        ("classifier", ["--loss", "both"], ["--loss both", "take softmax or cross_entropy"]),
        ("query_likelihood", ["--loss", "cross_entropy"], ["--loss cross_entropy", "--method classifier or yes_no"]),
        ("classifier", ["--loss", "sft"], ["--loss sft", "only --method yes_no has"]),
        ("query_likelihood", ["--loss", "sft"], ["--loss sft", "only --method yes_no has"]),
        ("classifier", ["--anchor", "0.1"], ["--anchor", "the model alone has no scores"]),
        ("classifier", ["--template", "plain"], ["--template plain", "the query is its target"]),
        ("query_likelihood", ["--template", "rankllama"], ["--template rankllama", "no target"]),
        ("classifier", ["--preset", "authors"], ["--adapter lora has no preset 'authors'"]),
        ("classifier", ["--yes", "blue"], ["unknown option --yes"]),
        ("yes_no", ["--yes", "yesterday"], ["--yes yesterday", "must be one token"]),
        ("yes_no", ["--yes", "no"], ["are the same token"]),
        ("cascade", [], ["--method cascade has nothing to train", "classifier, query_likelihood, yes_no"]),
        ("clasifier", [], ["unknown method 'clasifier'", "did you mean 'classifier'"]),
        ("classifier", ["--keep-every", "0"], ["keep-every is 0"]),
        ("classifier", ["--layers", "1-2"], ["--layers 1-2", "0-1"]),
        ("classifier", ["--layers", "one"], ["--layers one", "'one' is no range"]),
        ("classifier", ["--layers", "1-0"], ["--layers 1-0"]),
        ("classifier", ["--alpha", "0"], ["--alpha is 0"]),
    ],
)
def test_bad_options(arguments, tmp_path, capsys, method, more, words):
    fails(arguments(tmp_path / "mine", *more, method=method), capsys, tmp_path, *words)


@pytest.mark.parametrize(
    ("method", "more", "words"),
    [
        ("classifier", [], ["--method classifier trains a head, which goes with --adapter lora"]),
        ("yes_no", ["--gradient-checkpointing"], ["--gradient-checkpointing is for --adapter lora"]),
    ],
)
def test_what_goes_with_lora_only(arguments, tmp_path, capsys, method, more, words):
    command = arguments(tmp_path / "mine", *more, method=method)
    command[command.index("lora")] = "soft_prompt"
    command.remove("--r")
    command.remove("2")
    assert main(command) == 2
    said = capsys.readouterr().err
    assert all(word in said for word in words)
    assert not (tmp_path / "mine").exists()


def test_a_prompt_can_be_trained_to_answer(arguments, tmp_path):
    command = arguments(tmp_path / "mine", "--length", "3", method="yes_no")
    command[command.index("lora")] = "soft_prompt"
    del command[command.index("--r") : command.index("--r") + 2]
    assert main(command) == 0
    assert read_config(tmp_path / "mine")["method"] == "yes_no"


def test_quantisation_without_bitsandbytes(arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    command = arguments(tmp_path / "mine", "--quantization", "4bit")
    fails(command, capsys, tmp_path, "bitsandbytes", "pip install 'qpeft[quantized]'")


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
@pytest.mark.parametrize(("method", "adapter"), [("classifier", "lora"), ("query_likelihood", "qpeft_a")])
def test_training_on_a_quantised_model(
    method, adapter, quantization, arguments, rerank_arguments, wide_model, tmp_path
):
    """LoRA there is QLoRA (2305.14314); a prompt adapter reads the token table, which is not quantised."""
    output, run, plain = tmp_path / "mine", tmp_path / "mine.trec", tmp_path / "plain.trec"
    command = arguments(output, "--model", str(wide_model), "--quantization", quantization, method=method)
    if adapter != "lora":
        command[command.index("lora")] = adapter
        command[command.index("--r") : command.index("--r") + 2] = ["--num-heads", "2"]
    assert main(command) == 0
    history = json.loads((output / "provenance.json").read_text())["history"]
    losses = [row["loss"] for row in history if "loss" in row]
    assert losses
    assert all(map(math.isfinite, losses))

    model = ("--model", str(wide_model), "--adapter", str(output))
    assert main(rerank_arguments(run, *model, "--quantization", quantization)) == 0
    assert main(rerank_arguments(plain, *model)) == 0
    near, exact = (
        {(query, hit.passage_id): hit.score for query, ranking in read_run(path).items() for hit in ranking.hits}
        for path in (run, plain)
    )
    assert near == pytest.approx(exact, abs=0.5)
    assert near != exact
