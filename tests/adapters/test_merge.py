"""A merged model scores as the model with its adapter does, and as transformers reads it."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from qpeft import methods
from qpeft.adapters import lora
from qpeft.adapters._folder import save_adapter
from qpeft.cli import main
from qpeft.loading import load_lm
from qpeft.model_config import ModelConfig
from qpeft.template import Template, load_template
from tiny_adapters import PASSAGES, QUERIES
from tiny_adapters import build as build_adapter
from tiny_models import build_family, wordpiece_tokenizer

PAIRS = [(query, passage) for query in QUERIES for passage in PASSAGES]
ANSWERS = {"yes": "blue", "no": "red"}
TEMPLATES = {"query_likelihood": "upr", "classifier": "rankllama", "yes_no": "yes_no"}


@pytest.fixture
def saved(family, tmp_path):
    """Return the folder of a model of the family."""
    build_family(family).save_pretrained(tmp_path / "base")
    wordpiece_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def adapted(folder, output, method, template=None, **options):
    """Write an adapter whose every parameter matters; return the scores with it."""
    lm = load_lm(ModelConfig(str(folder), dtype="float32"))
    torch.manual_seed(1)
    adapter = lora.build(lora.Config(r=2, **options), lm)
    if method == "classifier":
        adapter.add_head(lm)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    template = template or load_template(TEMPLATES[method])
    own = ANSWERS if method == "yes_no" else {}
    save_adapter(output, "lora", adapter, lm, template, max_passage_tokens=20, method=method, method_options=own)
    return methods.open_scorer(lm, output).score(PAIRS)


def scores_of(folder, said):
    """Return the scores of a merged model, used as the command says."""
    words = said.rpartition("use it with ")[2].split()
    options = dict(zip([word.removeprefix("--").replace("-", "_") for word in words[::2]], words[1::2], strict=True))
    assert options.pop("model") == str(folder)
    method = methods.load(options.pop("method"))
    options["max_passage_tokens"] = int(options["max_passage_tokens"])
    lm = load_lm(ModelConfig(str(folder), dtype="float32"))
    return method.build_scorer(method.Config(**options), lm).score(PAIRS), lm


@pytest.mark.parametrize("method", TEMPLATES)
def test_merged_and_unmerged_scores_agree(family, saved, tmp_path, method, capsys):
    expected = adapted(saved, tmp_path / "a", method)
    assert (
        main(["merge", "--model", str(saved), "--adapter", str(tmp_path / "a"), "--output", str(tmp_path / "m")]) == 0
    )
    said = capsys.readouterr().err
    found, lm = scores_of(tmp_path / "m", said)
    assert found == pytest.approx(expected, abs=1e-4)
    assert not any("lora" in name or "base_layer" in name for name in lm.model.state_dict())
    own = method == "classifier" and family != "bert"
    assert type(lm.model).__name__.endswith("ForSequenceClassification") == own
    assert ("only qpeft reads it there" in said) == (method == "classifier" and family == "bert")
    facts = json.loads((tmp_path / "m" / "provenance.json").read_text())
    assert facts["adapter"]["name"] == "lora"
    assert len(facts["base"]["sha256"]) == 64
    assert facts["method"] == {"name": method, **(ANSWERS if method == "yes_no" else {})}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "base", "m"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_transformers_reads_what_is_merged(family, saved, tmp_path, capsys):
    expected = adapted(saved, tmp_path / "a", "classifier")
    assert (
        main(["merge", "--model", str(saved), "--adapter", str(tmp_path / "a"), "--output", str(tmp_path / "m")]) == 0
    )
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "m").eval()
    lm = load_lm(ModelConfig(str(saved), dtype="float32"))
    rows = methods.open_scorer(lm, tmp_path / "a").prepare(PAIRS).rows
    with torch.no_grad():
        found = [float(model(input_ids=torch.tensor([row.context])).logits) for row in rows]
    assert found == pytest.approx(expected, abs=1e-4)
    adapted(saved, tmp_path / "q", "query_likelihood")
    assert (
        main(["merge", "--model", str(saved), "--adapter", str(tmp_path / "q"), "--output", str(tmp_path / "m")]) == 0
    )
    words = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    before = AutoModelForCausalLM.from_pretrained(saved).state_dict()
    assert words.state_dict().keys() == before.keys()
    assert any(not torch.equal(tensor, before[name]) for name, tensor in words.state_dict().items())


@pytest.mark.parametrize("family", ["llama"])
@pytest.mark.parametrize("stored", ["float32", "float64"])
def test_types_of_numbers(family, stored, saved, tmp_path, capsys):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**config, "dtype": stored}))
    adapted(saved, tmp_path / "a", "classifier")
    command = ["merge", "--model", str(saved), "--adapter", str(tmp_path / "a"), "--output", str(tmp_path / "m")]
    for more, expected in ((["--dtype", "bfloat16"], "bfloat16"), ([], stored)):
        assert main([*command, *more]) == 0
        assert json.loads((tmp_path / "m" / "config.json").read_text())["dtype"] == expected
        assert f"LlamaForSequenceClassification, {expected}" in capsys.readouterr().err
    (tmp_path / "m" / "mine.trec").write_text("mine")
    assert main(command) == 2
    assert "holds 'mine.trec', which is no part of a merged model" in capsys.readouterr().err
    assert (tmp_path / "m" / "mine.trec").read_text() == "mine"


@pytest.mark.parametrize("family", ["llama"])
def test_training_goes_on_from_a_merged_classifier(family, saved, tmp_path, capsys):
    """Its head is what the next one starts as, and likelihoods it has none."""
    adapted(saved, tmp_path / "a", "classifier")
    assert (
        main(["merge", "--model", str(saved), "--adapter", str(tmp_path / "a"), "--output", str(tmp_path / "m")]) == 0
    )
    score = ["score", "--model", str(tmp_path / "m"), "--dtype", "float32", "--query", "why", "--passage", "the sky"]
    assert main(score) == 2
    assert "predicts no tokens: --method classifier" in capsys.readouterr().err
    assert main([*score, "--method", "classifier"]) == 0
    (tmp_path / "t.jsonl").write_text('{"query": "why", "pos": ["the sky"], "neg": ["the sea"]}\n')
    train = [
        "train",
        "--method",
        "classifier",
        "--adapter",
        "lora",
        "--train-file",
        str(tmp_path / "t.jsonl"),
        "--r",
        "2",
    ]
    train += ["--model", str(tmp_path / "m"), "--dtype", "float32", "--output", str(tmp_path / "b"), "--epochs", "0"]
    assert main(train) == 0
    capsys.readouterr()
    assert main([*score, "--method", "classifier", "--adapter", str(tmp_path / "b")]) == 0
    untrained = json.loads(capsys.readouterr().out)["score"]
    assert main([*score, "--method", "classifier"]) == 0
    assert json.loads(capsys.readouterr().out)["score"] == pytest.approx(untrained, abs=1e-5)


@pytest.mark.parametrize("family", ["llama"])
def test_what_cannot_be_merged(family, saved, tmp_path, capsys, monkeypatch):
    lm = load_lm(ModelConfig(str(saved), dtype="float32"))
    save_adapter(tmp_path / "p", "qpeft_a", build_adapter("qpeft_a", lm), lm, load_template("plain"))
    command = ["merge", "--model", str(saved), "--output", str(tmp_path / "m"), "--adapter"]
    assert main([*command, str(tmp_path / "p")]) == 2
    assert "adapter 'qpeft_a' cannot be merged: it writes vectors into the input" in capsys.readouterr().err
    assert not (tmp_path / "m").exists()
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "mine.txt").write_text("mine")
    adapted(saved, tmp_path / "a", "classifier")
    assert main([*command, str(tmp_path / "a")]) == 2
    assert "exists and is no folder of a merged model" in capsys.readouterr().err
    assert (tmp_path / "m" / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("family", ["llama"])
def test_a_template_is_kept_as_it_is(family, saved, tmp_path, capsys):
    template = Template("mine", 0, "passage: {passage}{hint}", "question: {query}", lowercase=False)
    adapted(saved, tmp_path / "a", "query_likelihood", template)
    command = ["merge", "--model", str(saved), "--adapter", str(tmp_path / "a"), "--output", str(tmp_path / "m")]
    assert main(command) == 0
    assert load_template(str(tmp_path / "m" / "template.yaml")) == template
