"""The classifier equals transformers' own on the same weights."""

import copy

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from qpeft import methods
from qpeft.adapters import lora
from qpeft.adapters._folder import load_adapter, save_adapter
from qpeft.errors import OptionError
from qpeft.lm.read_out import Head
from qpeft.loading import load_lm
from qpeft.methods.classifier import Config, build, build_scorer
from qpeft.model_config import ModelConfig
from qpeft.template import load_template
from tiny_adapters import PASSAGES, QUERIES
from tiny_adapters import build as build_adapter
from tiny_models import wordpiece_tokenizer

PAIRS = [(query, passage) for query in QUERIES for passage in PASSAGES]
WITH_A_CLASS = ["llama", "mistral", "qwen3", "gemma2", "gpt2", "gpt_neox", "mixtral"]
"""BERT's classifier reads the first token, which sees nothing behind it in a decoder."""


def classifier_of(lm, weight):
    """Return transformers' classifier with a language model's weights and a head `[1, d]`."""
    config = copy.deepcopy(lm.model.config)
    config.num_labels, config.pad_token_id = 1, 0
    model = AutoModelForSequenceClassification.from_config(config).eval()
    model.base_model.load_state_dict(lm.model.base_model.state_dict())
    model.score.weight.data = weight.clone()
    return model


def with_head(lm, seed=0):
    torch.manual_seed(seed)
    module = torch.nn.Linear(32, 1, bias=False).requires_grad_(False)
    lm.head = Head(module)
    return module.weight


def with_lora(lm, seed=1, **options):
    torch.manual_seed(seed)
    adapter = lora.build(lora.Config(r=2, **options), lm)
    adapter.add_head(lm)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    return adapter


@pytest.mark.parametrize("family", WITH_A_CLASS)
def test_scores_equal_those_of_transformers(family, make_lm):
    lm = make_lm(family)
    model = classifier_of(lm, with_head(lm))
    scorer = build_scorer(Config(), lm)
    texts = [f"query: {query.text} document: {passage.title} {passage.text}" for query, passage in PAIRS]
    inputs = lm.tokenizer(texts, add_special_tokens=False)["input_ids"]
    inputs = lm.tokenizer.pad({"input_ids": [[1, *ids] for ids in inputs]}, padding_side="right", return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs).logits[:, 0].tolist()
    assert scorer.score(PAIRS) == pytest.approx(expected, abs=1e-4)
    assert len({round(value, 3) for value in expected}) > len(PAIRS) // 2
    assert scorer.counts.pairs == len(PAIRS)


def test_training_and_scoring_agree(family, make_lm):
    lm = make_lm(family)
    adapter = with_lora(lm)
    scorer = build_scorer(Config(), lm).using(adapter)
    scores = scorer.batch_learned(scorer.prepare(PAIRS).rows)[0]
    assert scores.tolist() == pytest.approx(scorer.score(PAIRS), abs=1e-4)
    scores.sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in adapter.parameters())


def test_the_adapters_head_goes_before_the_models(make_lm):
    lm = make_lm("llama")
    weight = with_head(lm)
    scorer = build_scorer(Config(), lm)
    fresh = lora.build(lora.Config(), lm)
    fresh.add_head(lm)
    assert torch.equal(fresh.head.module.weight, weight), "it starts as the model's"
    assert scorer.using(fresh).score(PAIRS) == scorer.score(PAIRS)
    fresh.head.module.weight.data *= -1
    negated = [-score for score in scorer.score(PAIRS)]
    assert scorer.using(fresh).score(PAIRS) == pytest.approx(negated, abs=1e-6)
    prompted = lora.build(lora.Config(), lm)  # without a head of its own
    assert scorer.using(prompted).score(PAIRS) == scorer.score(PAIRS)


def test_folders_say_their_method(make_lm, tmp_path):
    lm = make_lm("gpt2")
    adapter = with_lora(lm)
    template = load_template("rankllama")
    save_adapter(tmp_path / "a", "lora", adapter, lm, template, max_passage_tokens=9, method="classifier")
    expected = build_scorer(Config(max_passage_tokens=9), lm).using(adapter).score(PAIRS)
    other = make_lm("gpt2")
    for scorer in (
        methods.open_scorer(other, tmp_path / "a"),
        build_scorer(Config(adapter=str(tmp_path / "a")), other),
        build_scorer(Config(), other, load_adapter(tmp_path / "a", other)),
    ):
        assert scorer.score(PAIRS) == expected
        assert scorer.counts.truncated_passages > 0
        assert scorer.facts["adapter"]["name"] == "lora"
        assert scorer.facts["template"]["name"] == "rankllama"
    for name in ("query_likelihood", "yes_no", "cascade"):
        module = methods.load(name)
        with pytest.raises(OptionError, match="was trained for --method classifier"):
            module.build(module.Config(adapter=str(tmp_path / "a")), other)
    assert "A classifier reranker: " in (tmp_path / "a" / "README.md").read_text()
    assert methods.chosen(None, tmp_path / "a") == "classifier"


def test_the_best_window_counts(make_lm):
    lm = make_lm("llama")
    with_head(lm)
    query, passage = QUERIES[0], PASSAGES[1]
    lengths = {"windows": 6, "window_overlap": 2}
    (best,) = build_scorer(Config(**lengths), lm).score([(query, passage)])
    scorer = build_scorer(Config(), lm)
    ids = scorer.prepare([(query, passage)]).rows[0]
    rows = scorer.prompt.rows(query, passage, windows=6, overlap=2)
    assert len(rows) > 2
    each = [float(value) for value in scorer.values(rows, [None] * len(rows))]
    assert best == pytest.approx(max(each), abs=1e-5)
    (mean,) = build_scorer(Config(**lengths, window_pool="mean"), lm).score([(query, passage)])
    assert mean == pytest.approx(sum(each) / len(each), abs=1e-5)
    assert len(ids) > max(map(len, rows))


def test_options_that_cannot_be(make_lm, t5):
    lm = make_lm("llama")
    with pytest.raises(OptionError, match="--method classifier needs a trained head"):
        build(Config(), lm)
    with_head(lm)
    with pytest.raises(OptionError, match="--template plain: the query is its target"):
        build(Config(template="plain"), lm)
    with pytest.raises(OptionError, match="--windows"):
        build(Config(windows=3, window_overlap=3), lm)
    with pytest.raises(OptionError, match="goes with --adapter lora"):
        build_adapter("soft_prompt", lm).add_head(lm)
    with pytest.raises(OptionError, match="--method classifier needs a trained head"):
        build(Config(), t5)


def test_a_classifier_may_be_opened_with_a_passage_cache(make_lm, tmp_path):
    """It keeps nothing there: rows go through it whole."""
    classifier_of(make_lm("llama"), torch.randn(1, 32)).save_pretrained(tmp_path)
    wordpiece_tokenizer().save_pretrained(tmp_path)
    plain, cached = (load_lm(ModelConfig(str(tmp_path), dtype="float32", passage_cache=size)) for size in (None, 0.1))
    assert build_scorer(Config(), cached).score(PAIRS) == pytest.approx(build_scorer(Config(), plain).score(PAIRS))
