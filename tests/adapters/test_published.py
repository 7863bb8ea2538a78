"""LoRA classifiers that PEFT wrote: the same scores here, whatever its version called the head."""

import json
import re

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from qpeft import methods
from qpeft.adapters._folder import load_adapter
from qpeft.errors import AdapterError, OptionError
from qpeft.methods import classifier
from qpeft.template import Template
from tiny_adapters import PASSAGES, QUERIES
from tiny_models import FAMILIES, SPECIAL

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")  # peft itself calls what was renamed
PAIRS = [(query, passage) for query in QUERIES for passage in PASSAGES]
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
MODULES = {"gpt2": ["c_attn", "c_fc"], "gpt_neox": ["query_key_value", "dense_4h_to_h"]}


def publish(lm, folder, **options):
    """Train nothing, but write what PEFT writes of a classifier; return it."""
    config = type(lm.model.config)(**{**FAMILIES[lm.model.config.model_type], **SPECIAL, "num_labels": 1})
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    model.config._name_or_path = model.name_or_path = f"hub/{lm.name}"
    model.base_model.load_state_dict(lm.model.base_model.state_dict())
    modules = MODULES.get(config.model_type, ["q_proj", "v_proj", "up_proj"])
    settings = peft.LoraConfig(
        task_type="SEQ_CLS", base_model_name_or_path=f"hub/{lm.name}", target_modules=modules, r=3, lora_alpha=7,
        fan_in_fan_out=config.model_type == "gpt2", **options,
    )  # fmt: skip
    made = peft.get_peft_model(model, settings).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.2)
    made.save_pretrained(folder, save_embedding_layers=False)
    return made


def scores_of(model, lm, texts):
    rows = lm.tokenizer(texts, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        return [float(model(input_ids=torch.tensor([[1, *ids]])).logits) for ids in rows]


def texts(form="query: {} document: {}"):
    return [form.format(query.text, f"{passage.title} {passage.text}".strip()) for query, passage in PAIRS]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma2", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "rank_pattern": {r"[cqu]\w+": 2}}])
def test_scores_equal_those_of_peft(family, make_lm, tmp_path, options):
    lm = make_lm(family)
    expected = scores_of(publish(lm, tmp_path, **options), lm, texts())
    assert len({round(score, 3) for score in expected}) > len(PAIRS) // 2
    scorer = classifier.build_scorer(classifier.Config(adapter=str(tmp_path)), lm)
    assert scorer.score(PAIRS) == pytest.approx(expected, abs=1e-4)
    assert methods.open_scorer(make_lm(family), tmp_path).score(PAIRS) == pytest.approx(expected, abs=1e-4)


@pytest.fixture
def published(make_lm, tmp_path):
    lm = make_lm("llama")
    return lm, tmp_path, scores_of(publish(lm, tmp_path), lm, texts())


@pytest.mark.parametrize(
    "head", ["score.weight", "score.modules_to_save.weight", "score.modules_to_save.default.weight"]
)
@pytest.mark.parametrize("binary", [False, True])
def test_names_that_heads_have(published, head, binary):
    lm, folder, expected = published
    tensors = load_file(folder / WEIGHTS)
    tensors[f"base_model.model.{head}"] = tensors.pop("base_model.model.score.weight")
    tensors["base_model.model.score.original_module.weight"] = torch.zeros(1, 32)
    tensors = {re.sub(r"(lora_[AB])\.weight", r"\1.default.weight", name): value for name, value in tensors.items()}
    (folder / WEIGHTS).unlink()
    if binary:
        torch.save(tensors, folder / "adapter_model.bin")
    else:
        save_file(tensors, folder / WEIGHTS)
    assert methods.open_scorer(lm, folder).score(PAIRS) == pytest.approx(expected, abs=1e-4)


def test_the_template_is_asked_for(published, tmp_path):
    lm, folder, expected = published
    path = tmp_path / "other.yaml"
    path.write_text('name: other\nversion: 1\ncontext: "{passage} ? {query}"\n')
    scorer = classifier.build_scorer(classifier.Config(adapter=str(folder), template=str(path)), lm)
    assert scorer.facts["template"]["name"] == "other"
    assert scorer.score(PAIRS) != pytest.approx(expected, abs=1e-2)
    opened = load_adapter(folder, lm)
    assert (opened.method, opened.template.name, opened.max_passage_tokens) == ("classifier", "rankllama", None)
    assert isinstance(opened.template, Template)
    assert methods.chosen(None, folder) == opened.method
    with pytest.raises(OptionError, match="was trained for --method classifier"):
        methods.load("query_likelihood").build(methods.load("query_likelihood").Config(adapter=str(folder)), lm)


def test_what_is_refused(published, make_lm):
    lm, folder, _ = published
    with pytest.raises(
        AdapterError, match="was trained for 'hub/tiny-llama', not for 'tiny-mistral'; the name of a copy"
    ):
        load_adapter(folder, make_lm("mistral"))
    tensors = load_file(folder / WEIGHTS)
    some = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    for changed, message in (
        ({**tensors, "base_model.model.model.norm.weight": torch.ones(32)}, "Unexpected key.*model.model.norm.weight"),
        ({name: value for name, value in tensors.items() if name != some}, "Missing key.*q_proj.lora_A.weight"),
        ({**tensors, some: torch.ones(3, 31)}, "size mismatch .*q_proj.lora_A.weight"),
        ({n: v for n, v in tensors.items() if "score" not in n}, "has no trained heads on the last token, not one"),
        ({**tensors, "base_model.model.score.modules_to_save.weight": torch.ones(1, 32)}, "has 2 trained heads"),
    ):
        save_file(changed, folder / WEIGHTS)
        with pytest.raises(AdapterError, match=message):
            load_adapter(folder, lm)
    assert lm.model.peft_config == {}, "what failed was taken out again"
    (folder / WEIGHTS).write_bytes(b"no tensors")
    with pytest.raises(AdapterError, match=f"{WEIGHTS}: cannot be read"):
        load_adapter(folder, lm)
    (folder / WEIGHTS).unlink()
    with pytest.raises(AdapterError, match=r"has no weights: adapter_model\.safetensors or"):
        load_adapter(folder, lm)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_a_start_that_changes_the_base_model_is_refused(published, start):
    lm, folder, _ = published
    before = {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}
    described = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(described | {"init_lora_weights": start}))
    with pytest.raises(AdapterError, match=f"init_lora_weights is '{start}', which changes the base model"):
        load_adapter(folder, lm)
    assert all(torch.equal(tensor, before[name]) for name, tensor in lm.model.state_dict().items())


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"])
def test_a_file_that_holds_no_tensors(published, content):
    lm, folder, _ = published
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(content)
    with pytest.raises(AdapterError, match=r"adapter_model\.bin: cannot be read"):
        load_adapter(folder, lm)


def test_other_tasks_are_not_understood(published):
    lm, folder, _ = published
    described = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(described | {"task_type": "CAUSAL_LM"}))
    with pytest.raises(AdapterError, match=r"not an adapter of qpeft \(peft_type 'LORA'"):
        load_adapter(folder, lm)
