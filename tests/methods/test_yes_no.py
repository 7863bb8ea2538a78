"""Yes or no: the difference of two log-probabilities at the last token."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from qpeft import methods
from qpeft.adapters import lora
from qpeft.adapters._folder import save_adapter
from qpeft.errors import OptionError
from qpeft.methods.yes_no import Config, build, build_scorer
from qpeft.template import Prompt, Template, load_template
from qpeft.training.config import ReadOutTraining
from qpeft.training.trainer import Collator, Learner
from reference import naive_read
from tiny_adapters import PASSAGES, QUERIES
from tiny_training import GROUPS

PAIRS = [(query, passage) for query in QUERIES for passage in PASSAGES]


def reference(lm, scorer, yes, no, model=None):
    tokens = lm.tokenizer.convert_tokens_to_ids([yes, no])
    found = []
    for row in scorer.prepare(PAIRS).rows:
        values = naive_read(model or lm.model, row, tokens)
        found.append(values[0] - values[1])
    return found


@pytest.fixture
def short(tmp_path):
    """A template whose question the tiny mistral's window can look past."""
    path = tmp_path / "short.yaml"
    path.write_text('name: short\nversion: 1\ncontext: "{passage} ? {query} : "\n')
    return str(path)


def test_scores_equal_the_naive_reference(family, make_lm, short):
    lm = make_lm(family)
    scorer = build_scorer(Config(template=short), lm)
    expected = reference(lm, scorer, "yes", "no")
    assert scorer.score(PAIRS) == pytest.approx(expected, abs=1e-4)
    assert len({round(score, 3) for score in expected}) > len(PAIRS) // 2
    swapped = build_scorer(Config(template=short, yes="no", no="yes"), lm).score(PAIRS)
    assert swapped == pytest.approx([-score for score in expected], abs=1e-4)
    other = build_scorer(Config(template=short, yes="blue", no="red"), lm)
    assert other.score(PAIRS) == pytest.approx(reference(lm, other, "blue", "red"), abs=1e-4)
    assert other.facts["answers"] == {"yes": "blue", "no": "red"}


def test_training_and_scoring_agree(family, make_lm, short):
    lm = make_lm(family)
    scorer = build_scorer(Config(template=short), lm).using(trained(lm))
    scores = scorer.batch_learned(scorer.prepare(PAIRS).rows)[0]
    assert scores.tolist() == pytest.approx(scorer.score(PAIRS), abs=1e-4)
    scores.sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in scorer.adapter.parameters())


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("name", ["sft", "cross_entropy", "softmax"])
def test_losses_equal_those_on_the_model_s_own_logits(name, family, make_lm, short):
    """What the trainer learns, against transformers' logits and torch's cross-entropy, row by row; 1e-4 in float32."""
    lm = make_lm(family)
    scorer = build_scorer(Config(template=short), lm)
    adapter = trained(lm)
    config = ReadOutTraining(loss=name)
    batch = Collator(scorer, config, 0)([(0, group) for group in GROUPS])["batch"]
    answers = torch.tensor(lm.tokenizer.convert_tokens_to_ids(["yes", "no"]))
    with adapter.applied():
        logits = torch.stack([lm.model(torch.tensor([row.context])).logits[0, -1] for row in batch.rows])
    right = torch.where(torch.arange(len(batch.rows)) % batch.mask.shape[1] == 0, 0, 1)
    if name == "sft":
        expected = cross_entropy(logits, answers[right])
    elif name == "cross_entropy":
        expected = cross_entropy(logits[:, answers], right)
    else:
        odds = (logits[:, answers[0]] - logits[:, answers[1]]).view(batch.mask.shape)
        expected = cross_entropy(odds, torch.zeros(len(odds), dtype=torch.long))
    wanted = torch.autograd.grad(expected, list(adapter.parameters()))
    found = Learner(adapter, config, scorer)(batch)["loss"]
    assert found.item() == pytest.approx(expected.item(), abs=1e-4)
    for one, other in zip(torch.autograd.grad(found, list(adapter.parameters())), wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)
        assert other.abs().max() > 1e-3


def trained(lm):
    torch.manual_seed(3)
    adapter = lora.build(lora.Config(r=2), lm)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    return adapter


def test_the_answer_has_the_blank_that_the_template_ends_with(tokenizers):
    def follows(name, context, **options):
        prompt = Prompt(Template("t", 1, context, **options), tokenizers[name], 128)
        return tokenizers[name].convert_ids_to_tokens(list(prompt.following("why")))

    assert follows("bytes", "{query} {passage} ? ") == ["Ġwhy"]
    assert follows("bytes", "{query} {passage} ?") == ["why"]
    assert follows("bytes", "{query} {passage} ? ", end=True) == ["why"]
    assert follows("metaspace", "{query} {passage} ? ") == ["▁why"]


def test_an_encoder_decoder(t5):
    scorer = build_scorer(Config(yes="blue", no="red"), t5)
    ids = t5.tokenizer.convert_tokens_to_ids(["blue", "red"])
    expected = []
    for row in scorer.prepare(PAIRS).rows:
        with torch.no_grad():
            logits = t5.model(input_ids=torch.tensor([row.context]), decoder_input_ids=torch.tensor([[0]])).logits[0, 0]
        expected.append(float(logits[ids[0]] - logits[ids[1]]))
    assert scorer.score(PAIRS) == pytest.approx(expected, abs=1e-4)


def test_an_adapter_keeps_its_answers(make_lm, tmp_path):
    lm = make_lm("llama")
    adapter = trained(lm)
    options = {"yes": "blue", "no": "red"}
    save_adapter(tmp_path / "a", "lora", adapter, lm, load_template("yes_no"), method="yes_no", method_options=options)
    expected = build_scorer(Config(**options), lm).using(adapter).score(PAIRS)
    other = make_lm("llama")
    assert methods.open_scorer(other, tmp_path / "a").score(PAIRS) == expected
    assert build_scorer(Config(adapter=str(tmp_path / "a"), yes="blue"), other).score(PAIRS) == expected
    with pytest.raises(OptionError, match="--no green: the adapter was trained with 'red'"):
        build(Config(adapter=str(tmp_path / "a"), no="green"), other)
    with pytest.raises(OptionError, match="was trained for --method yes_no"):
        methods.load("classifier").build(methods.load("classifier").Config(adapter=str(tmp_path / "a")), other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"yes": "yesterday"}, r"--yes yesterday: must be one token behind the template; it is \d+: \['yes', '##t'"),
        ({"no": "☃"}, r"--no ☃: must be one token .* it is 1: \['\[UNK\]'\]"),
        ({"no": " "}, r"--no  : must be one token .* it is 0: \[\]"),
        ({"yes": "no"}, "--yes no and --no no are the same token"),
        ({"template": "qpeft"}, "--template qpeft: the query is its target"),
        ({"template": "yes-no"}, "did you mean 'yes_no'"),
        ({"max_passage_tokens": 0}, "--max-passage-tokens is 0"),
    ],
)
def test_options_that_cannot_be(make_lm, options, message):
    with pytest.raises(OptionError, match=message):
        build(Config(**options), make_lm("llama"))
