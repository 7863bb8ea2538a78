import json
import shutil

import pytest
import torch
from test_bad_input import fails

from qpeft.adapters._folder import WEIGHTS, load_adapter, read_config
from qpeft.cli import main
from qpeft.data.trec import read_run, write_run
from qpeft.loading import load_lm
from qpeft.model_config import ModelConfig
from qpeft.template import load_template
from qpeft.training.trainer import Collator
from qpeft.types import Ranking, Run
from tiny_adapters import NAMES, SMALL

GROUPS = [
    {"query": "why is the sky blue?", "pos": ["the sky is blue"], "neg": ["the sea is salty", "the old cat"]},
    {"query": "who made the lake", "pos": ["the new king made a lake"], "neg": ["the king and the lion"]},
    {"query": "three heart", "pos": ["the octopus has three heart"], "neg": ["the red sky", "a long river"]},
]


@pytest.fixture(scope="module")
def collection(toy, tmp_path_factory):
    """The toy with a training split, and without answers, which all of its passages hold."""
    folder = tmp_path_factory.mktemp("train") / "toy"
    shutil.copytree(toy, folder)
    queries = [json.loads(line) for line in (folder / "queries.jsonl").read_text().splitlines()]
    lines = [json.dumps({"_id": query["_id"], "text": query["text"]}) for query in queries]
    (folder / "queries.jsonl").write_text("\n".join(lines) + "\n")
    shutil.copy(folder / "qrels" / "dev.tsv", folder / "qrels" / "train.tsv")
    return folder


@pytest.fixture
def arguments(collection, saved_model):
    """Return a function that makes the arguments of a training of six steps."""

    def make(output, *more, adapter="qpeft_a", data=None):
        small = [word for name, value in SMALL[adapter].items() for word in (f"--{name}", str(value))]
        return [
            "train", "--output", str(output), *(data or ["--collection", str(collection)]),
            "--model", str(saved_model), "--dtype", "float32", "--adapter", adapter, *small,
            "--batch-queries", "2", "--epochs", "2", "--negatives", "2", "--evaluations", "3", "--dev-depth", "6",
            "--learning-rate", "0.01", *more,
        ]  # fmt: skip

    return make


@pytest.fixture
def train_file(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(group) + "\n" for group in GROUPS))
    return path


@pytest.mark.parametrize("adapter", NAMES)
def test_a_trained_adapter_reranks(adapter, arguments, rerank_arguments, saved_model, tmp_path, capsys):
    output = tmp_path / "mine"
    assert main(arguments(output, "--max-passage-tokens", "9", adapter=adapter)) == 0
    said = capsys.readouterr().err
    assert f"{adapter}: " in said
    assert "6 queries" in said
    assert "zero-shot " in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine"]
    lm = load_lm(ModelConfig(str(saved_model), dtype="float32"))
    opened = load_adapter(output, lm)
    assert (opened.name, opened.template, opened.max_passage_tokens) == (adapter, load_template("plain"), 9)
    untrained = dict(load_untrained(adapter, lm).state_dict())
    assert any(not torch.equal(untrained[name], tensor) for name, tensor in opened.adapter.state_dict().items())

    facts = json.loads((output / "provenance.json").read_text())
    assert facts["training"]["steps"] == 6
    assert facts["training"]["trained_parameters"] == read_config(output)["trained_parameters"] > 0
    assert facts["dev"]["measure"] == "RR@10"
    assert 0 < facts["dev"]["zero_shot"] <= 1
    assert facts["dev"]["trained"] == max(entry.get("eval_RR@10", 0) for entry in facts["history"])
    assert facts["model"]["dtype"] == "float32"
    assert facts["mining"]["queries"] == 6

    runs = []
    for more in (["--adapter", str(output)], ["--max-passage-tokens", "9"]):
        assert main(rerank_arguments(tmp_path / "ql.trec", *more)) == 0
        runs.append(read_run(tmp_path / "ql.trec"))
    assert dict(runs[0]) != dict(runs[1])
    capsys.readouterr()


def load_untrained(adapter, lm):
    from qpeft import adapters

    torch.manual_seed(0)
    module = adapters.load(adapter)
    return module.build(module.Config(**SMALL[adapter]), lm)


def test_provenance_of_a_reranking_names_the_adapter(arguments, rerank_arguments, tmp_path):
    assert main(arguments(tmp_path / "mine", adapter="soft_prompt")) == 0
    assert main(rerank_arguments(tmp_path / "ql.trec", "--adapter", str(tmp_path / "mine"))) == 0
    facts = json.loads((tmp_path / "ql.trec.provenance.json").read_text())
    assert facts["adapter"]["name"] == "soft_prompt"
    assert len(facts["adapter"]["sha256"]) == 64


def test_the_same_command_gives_the_same_bytes(arguments, tmp_path):
    for name in ("a", "b"):
        assert main(arguments(tmp_path / name)) == 0
    assert main(arguments(tmp_path / "c", "--seed", "1")) == 0
    first, again, other = ((tmp_path / name / WEIGHTS).read_bytes() for name in "abc")
    assert first == again != other


def interrupt(monkeypatch, after):
    """Let Ctrl-C fall into the drawing of a batch."""
    calls, draw = [], Collator.__call__

    def drawing(self, items):
        calls.append(items)
        if len(calls) > after:
            raise KeyboardInterrupt
        return draw(self, items)

    monkeypatch.setattr(Collator, "__call__", drawing)


@pytest.mark.parametrize("more", [(), ("--attn-dropout", "0.2", "--patience", "2"), ("--gradient-accumulation", "2")])
def test_an_interrupted_training_resumes_to_the_same_bytes(arguments, tmp_path, monkeypatch, capsys, more):
    whole, output = tmp_path / "whole", tmp_path / "mine"
    assert main(arguments(whole, *more)) == 0
    with monkeypatch.context() as patch:
        interrupt(patch, after=5)
        assert main(arguments(output, *more)) == 130
    assert not output.exists()
    assert list((tmp_path / "mine.checkpoints").glob("checkpoint-*"))
    capsys.readouterr()
    assert main(arguments(output, *more)) == 2
    assert "mine.checkpoints is an unfinished training: continue it with --resume" in capsys.readouterr().err
    assert main(arguments(output, *more, "--resume", "--margin", "0.7")) == 2
    assert "other options, data or model" in capsys.readouterr().err
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert main(arguments(output, *more, "--resume")) == 0
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(threads)
    assert (output / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    facts = [json.loads((folder / "provenance.json").read_text()) for folder in (output, whole)]
    assert facts[0]["history"] == facts[1]["history"]
    assert facts[0]["dev"] == facts[1]["dev"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "whole"]


def test_what_ended_before_its_first_checkpoint_starts_afresh(arguments, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt(patch, after=1)
        assert main(arguments(tmp_path / "mine")) == 130
    assert main(arguments(tmp_path / "mine", "--margin", "0.7")) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine"]


def test_a_file_of_groups(arguments, train_file, collection, tmp_path, capsys):
    assert main(arguments(tmp_path / "mine", data=["--train-file", str(train_file)])) == 0
    facts = json.loads((tmp_path / "mine" / "provenance.json").read_text())
    assert facts["training"]["queries"] == 3
    assert facts["training"]["steps"] == 3
    assert facts["collection"] is None
    assert facts["dev"] is None
    both = ["--train-file", str(train_file), "--collection", str(collection)]
    assert main(arguments(tmp_path / "both", "--train-queries", "2", data=both)) == 0
    facts = json.loads((tmp_path / "both" / "provenance.json").read_text())
    assert facts["training"]["queries"] == 2
    assert facts["dev"]["trained"] > 0
    assert len(facts["files"]["train_file"]) == 64
    capsys.readouterr()


def test_another_train_file_is_no_continuation(arguments, train_file, tmp_path, monkeypatch, capsys):
    data = ["--train-file", str(train_file)]
    with monkeypatch.context() as patch:
        interrupt(patch, after=2)
        assert main(arguments(tmp_path / "mine", data=data)) == 130
    train_file.write_text(train_file.read_text().replace("the old cat", "a dog"))
    assert main(arguments(tmp_path / "mine", "--resume", data=data)) == 2
    assert "other options, data or model" in capsys.readouterr().err


def test_a_teacher(arguments, toy_run, tmp_path):
    more = ["--teacher", str(toy_run), "--loss", "margin_mse"]
    assert main(arguments(tmp_path / "mine", *more, adapter="soft_prompt")) == 0
    assert json.loads((tmp_path / "mine" / "provenance.json").read_text())["history"][0]["loss"] > 0


def test_negatives_and_dev_candidates_from_runs(arguments, toy_run, tmp_path):
    run = read_run(toy_run)
    write_run(Run((Ranking(q, r.hits[:3]) for q, r in list(run.items())[:2]), "short"), tmp_path / "dev.trec")
    more = ["--run", str(toy_run), "--dev-run", str(tmp_path / "dev.trec"), "--epochs", "0"]
    assert main(arguments(tmp_path / "mine", *more)) == 0
    facts = json.loads((tmp_path / "mine" / "provenance.json").read_text())
    assert facts["dev"]["queries"] == 2
    assert set(facts["files"]) == {"run", "dev_run"}
    assert facts["history"] == []


def test_the_preset_authors(collection, saved_model, tmp_path):
    command = ["train", "--preset", "authors", "--adapter", "qpeft_r", "--collection", str(collection), "--epochs", "1"]
    assert main([*command, "--model", str(saved_model), "--dtype", "float32", "--output", str(tmp_path / "mine")]) == 0
    described = read_config(tmp_path / "mine")
    assert described["template"]["name"] == "qpeft_authors"
    assert described["options"]["token_table"] == "trainable"


def test_a_report(arguments, tmp_path):
    assert main(arguments(tmp_path / "mine", "--report", adapter="soft_prompt")) == 0
    assert (tmp_path / "mine" / "training.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("adapter", "more", "words"),
    [
        ("qpeft_r", ["--k", "0"], ["--k is 0; it must be at least 1"]),
        ("qpeft_a", ["--attn-dim", "64"], ["--attn-dim 64", "at most 32"]),
        ("qpeft_c", ["--layer", "9"], ["--layer is 9; the model has 2 layers"]),
        ("soft_prompt", ["--preset", "authors"], ["'soft_prompt' has no preset 'authors'"]),
        ("soft_prompt", ["--preset", "author"], ["unknown preset", "did you mean 'authors'"]),
        ("soft_prompt", ["--k", "3"], ["unknown option --k"]),
        ("soft_prompt", ["--template", "plian"], ["did you mean 'plain'"]),
        ("soft_prompt", ["--max-length", "14"], ["query '", "leaves no room for a passage", "the limit is 14"]),
        ("soft_prompt", ["--batch-queries", "0"], ["--batch-queries is 0"]),
        ("soft_prompt", ["--learning-rate", "-1"], ["--learning-rate is -1.0"]),
        ("soft_prompt", ["--loss", "margin_mse"], ["'margin_mse' learns from a teacher"]),
        ("soft_prompt", ["--loss", "hinge"], ["loss", "hinge"]),
        ("soft_prompt", ["--teacher", "nowhere.trec", "--loss", "margin_mse"], ["nowhere.trec"]),
        ("soft_prompt", ["--measure", "nDGC@10"], ["nDGC", "did you mean 'nDCG'"]),
        ("soft_prompt", ["--measure", "RR@10 R@5"], ["one measure decides"]),
        ("soft_prompt", ["--split", "trian"], ["trian"]),
        ("soft_prompt", ["--train-queries", "0"], ["queries is 0"]),
        ("soft_prompt", ["--dev-depth", "0"], ["dev-depth is 0"]),
        ("soft_prompt", ["--dev-queries", "0"], ["dev-queries is 0"]),
        ("soft_prompt", ["--max-passage-tokens", "0"], ["max-passage-tokens is 0"]),
    ],
)
def test_bad_options(arguments, tmp_path, capsys, adapter, more, words):
    fails(arguments(tmp_path / "mine", *more, adapter=adapter), capsys, tmp_path, *words)


def test_unknown_adapters(arguments, tmp_path, capsys):
    command = arguments(tmp_path / "mine")
    command[command.index("qpeft_a")] = "qpeft_q"
    fails(command, capsys, tmp_path, "unknown adapter 'qpeft_q'", "did you mean 'qpeft_")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"query": "who", "pos": []}, ["train.jsonl:4", "no positive"]),
        ({"query": " ", "pos": ["the sky"]}, ["train.jsonl:4", "query is empty"]),
        ({"query": "who"}, ["train.jsonl:4"]),
    ],
)
def test_bad_files_of_groups(arguments, train_file, tmp_path, capsys, line, words):
    with train_file.open("a") as file:
        file.write(json.dumps(line) + "\n")
    fails(arguments(tmp_path / "mine", data=["--train-file", str(train_file)]), capsys, tmp_path, *words)


def test_no_data_and_no_positives(arguments, collection, tmp_path, capsys):
    fails(arguments(tmp_path / "mine", data=["--seed", "1"]), capsys, tmp_path, "--collection", "--train-file")
    lonely = tmp_path / "lonely"
    shutil.copytree(collection, lonely)
    (lonely / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\nq1\tsky-0\t0\n")
    command = arguments(tmp_path / "mine", data=["--collection", str(lonely)])
    fails(command, capsys, tmp_path, "no query of split 'train' has a relevant passage")


def test_a_template_without_a_place_for_a_hint(arguments, tmp_path, capsys):
    path = tmp_path / "bare.yaml"
    path.write_text('name: bare\nversion: 1\ncontext: "{passage}"\ntarget: "Question: {query}"\n')
    fails(arguments(tmp_path / "mine", "--template", str(path)), capsys, tmp_path, "'bare' has no place for a hint")


def test_states_need_the_hint_after_the_passage(arguments, tmp_path, capsys):
    path = tmp_path / "before.yaml"
    path.write_text('name: before\nversion: 1\ncontext: "a {hint} passage: {passage}"\ntarget: "question: {query}"\n')
    command = arguments(tmp_path / "mine", "--template", str(path), adapter="qpeft_c")
    fails(command, capsys, tmp_path, "needs its hint after the passage")
    assert main(arguments(tmp_path / "mine", "--template", str(path), "--epochs", "1")) == 0


def test_what_stands_in_the_way(arguments, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    fails(arguments(tmp_path / "mine"), capsys, tmp_path, "mine exists and is no adapter folder")


def test_an_adapter_of_another_model(arguments, rerank_arguments, saved_model, tmp_path, capsys):
    output = tmp_path / "mine"
    assert main(arguments(output, "--epochs", "0")) == 0
    described = json.loads((output / "adapter_config.json").read_text())
    described["base"]["sha256"] = "0" * 64
    (output / "adapter_config.json").write_text(json.dumps(described))
    command = rerank_arguments(tmp_path / "ql.trec", "--adapter", str(output))
    fails(command, capsys, tmp_path, "was trained for", "with weights 000000000000", str(saved_model))
    fails([*command[:-1], str(tmp_path)], capsys, tmp_path, "no adapter in")
