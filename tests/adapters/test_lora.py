import json
import sys
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    MambaConfig,
    MambaForCausalLM,
)

from qpeft.adapters import lora
from qpeft.adapters._folder import load_adapter, read_config, save_adapter
from qpeft.adapters._lora_targets import resolve
from qpeft.cli import main
from qpeft.errors import AdapterError, MissingDependencyError, OptionError
from qpeft.lm.causal import CausalLM
from qpeft.loading import load_reranker
from qpeft.methods import open_scorer
from qpeft.template import Prompt, Template, load_template
from reference import naive_hinted_log_probs, naive_hints, naive_log_probs
from tiny_adapters import PASSAGES, QUERIES, build, rows_for, with_store
from tiny_models import FAMILIES, SPECIAL, build_family, wordpiece_tokenizer
from tiny_models import GATED as SMALL_GATED

ATTENTION = {
    "bert": {"query", "key", "value", "dense"},
    "gpt2": {"c_attn", "c_proj"},
    "gpt_neox": {"query_key_value", "dense"},
}
MLP = {
    "bert": {"dense"},
    "gpt2": {"c_fc", "c_proj"},
    "gpt_neox": {"dense_h_to_4h", "dense_4h_to_h"},
    "mixtral": {"experts", "base_layer"},
}
WIDE = {"gpt2": {"n_embd": 64}} | {family: {"hidden_size": 64} for family in ("llama", "gemma2")}
GATED = {"q_proj", "k_proj", "v_proj", "o_proj"}, {"gate_proj", "up_proj", "down_proj"}


def trained(lm, *, seed=1, **options):
    """Return an adapter whose every parameter matters."""
    torch.manual_seed(seed)
    adapter = lora.build(lora.Config(**{"r": 3, **options}), lm)
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return adapter


def targets(values):
    return [value.target for value in values]


def assert_same(found, expected, tolerance=0.0):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=tolerance, rtol=0)


def distance(found, expected):
    return max(float((one - other).abs().max()) for one, other in zip(found, expected, strict=True))


def layer_names(adapter):
    """Return the paths of the layers that have additions."""
    return {key.removeprefix("model.").rpartition(".lora_")[0] for key in adapter.state_dict()}


def open_with_peft(model, folder):
    """Return a base model with the folder's additions, opened by peft alone, in evaluation mode."""
    with warnings.catch_warnings():
        # peft itself calls what transformers has renamed; nothing else may warn.
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing")
        return peft.PeftModel.from_pretrained(model, folder).eval()


@pytest.mark.parametrize("modules", ["all", "attention", "mlp"])
@pytest.mark.usefixtures("one_thread")  # so that batches are the same, and with them the last bits
def test_untrained_lora_changes_nothing(family, make_lm, modules):
    lm = make_lm(family)
    stored = with_store(lm)
    rows = rows_for(lm, lora.build(lora.Config(), make_lm(family)))
    before = targets(lm.log_probs(rows))
    adapter = lora.build(lora.Config(modules=modules), lm)
    assert_same(targets(lm.log_probs(rows, adapters=adapter)), before)
    assert_same(targets(stored.log_probs(rows, adapters=adapter)), before, 1e-4)
    assert stored.store.misses == 0, "contexts that were encoded without the additions are of no use"


@pytest.mark.parametrize("modules", ["all", "attention", "mlp"])
def test_scores_equal_those_of_peft_on_the_same_folder(family, make_lm, tmp_path, modules):
    lm = make_lm(family)
    before = make_lm(family)
    adapter = trained(lm, modules=modules)
    rows = rows_for(lm, adapter)
    scores = targets(lm.log_probs(rows, adapters=adapter))
    zero_shot = targets(before.log_probs(rows))
    assert distance(scores, zero_shot) > 0.01, "additions without influence would hide mistakes"
    assert_same(targets(lm.log_probs(rows)), zero_shot)

    save_adapter(tmp_path / "a", "lora", adapter, lm, load_template("plain"))
    model = open_with_peft(build_family(family), tmp_path / "a").get_base_model()
    for row, score in zip(rows, scores, strict=True):
        expected, _ = naive_log_probs(model, row)
        torch.testing.assert_close(score.double(), torch.tensor(expected).double(), atol=1e-4, rtol=0)


def test_only_the_additions_are_trained(family, make_lm):
    lm = make_lm(family)
    weights = {id(p): (p, p.clone()) for p in lm.model.parameters()}
    adapter = lora.build(lora.Config(r=2), lm).train()
    assert adapter.count_parameters() == sum(tensor.numel() for tensor in adapter.state_dict().values())
    rows = rows_for(lm, adapter)[:4]
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        values, _ = lm.score(rows, [adapter] * len(rows))
        lm.log_probs(rows[:1])  # another use of the model, before the backward pass
        (-values.mean()).backward()
        assert all(p.grad is not None for p in adapter.parameters())
        optimizer.step()
        losses.append(-float(values.detach().mean()))
    assert losses[-1] < losses[0]
    assert all(torch.equal(parameter, before) for parameter, before in weights.values())
    assert all(p.grad is None and not p.requires_grad for p, _ in weights.values())


def test_two_adapters_do_not_disturb_each_other(make_lm):
    lm = make_lm("gpt2")
    first, second = trained(lm, seed=1), trained(lm, seed=2, modules="attention")
    rows = rows_for(lm, first)
    alone = make_lm("gpt2")
    expected = targets(alone.log_probs(rows, adapters=trained(alone, seed=1)))
    assert_same(targets(lm.log_probs(rows, adapters=first)), expected)
    assert distance(targets(lm.log_probs(rows, adapters=second)), expected) > 0.01
    second.requires_grad_(False)
    assert_same(targets(lm.log_probs(rows, adapters=first)), expected)
    assert all(parameter.requires_grad for parameter in first.parameters())
    assert not any(parameter.requires_grad for parameter in second.parameters())
    with pytest.raises(RuntimeError, match="in between"), first.applied():
        raise RuntimeError("in between")
    assert_same(targets(lm.log_probs(rows)), targets(make_lm("gpt2").log_probs(rows)))


@pytest.mark.parametrize("stored", [False, True])
def test_rows_of_several_adapters(make_lm, stored):
    lm = make_lm("llama")
    prompt = build("qpeft_a", lm, trained=True)
    each = [trained(lm, seed=1), None, prompt, trained(lm, seed=2, hint="soft_prompt")]
    rows = rows_for(lm, max(each[2:], key=lambda adapter: adapter.hint_length(9)))
    adapters = [each[i % 4] for i in range(len(rows))]
    scorer = with_store(lm) if stored else lm
    alone = [scorer.log_probs([row], adapters=a)[0].target for row, a in zip(rows, adapters, strict=True)]
    assert_same(targets(scorer.log_probs(rows, adapters=adapters)), alone, 1e-4)
    for mixed in ([each[0], None], [each[0], prompt], [each[0], each[3]]):
        with pytest.raises(OptionError, match="cannot share a batch"):
            lm.score(rows[:2], mixed)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_what_is_withdrawn_leaves_the_model_and_its_other_adapters_as_they_were(family, make_lm):
    lm = make_lm(family)
    rows = rows_for(lm, build("soft_prompt", lm))
    alone = targets(lm.log_probs(rows))
    size = sum(parameter.numel() for parameter in lm.model.parameters())
    first, second = trained(lm, seed=1), trained(lm, seed=2)
    expected = targets(lm.log_probs(rows, adapters=second))
    first.withdraw()
    third = trained(lm, seed=3)  # under a name of its own, though two are there again
    assert_same(targets(lm.log_probs(rows, adapters=second)), expected)
    assert distance(targets(lm.log_probs(rows, adapters=third)), expected) > 1e-3
    second.withdraw()
    third.withdraw()
    third.withdraw()
    with pytest.raises(AdapterError, match="was taken out of the model"):
        lm.log_probs(rows, adapters=third)
    assert sum(parameter.numel() for parameter in lm.model.parameters()) == size
    assert_same(targets(lm.log_probs(rows)), alone)


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral"])
def test_a_float32_adapter_on_a_bfloat16_model(family, make_lm):
    lm = make_lm(family, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in lm.model.parameters():
            if parameter.ndim > 1:
                parameter.div_(4)
    adapter = trained(lm)
    assert {parameter.dtype for parameter in adapter.parameters()} == {torch.float32}
    rows = rows_for(lm, adapter)
    with adapter.applied():
        expected = [torch.tensor(naive_log_probs(lm.model, row)[0]).mean() for row in rows]
    for value, mean in zip(lm.log_probs(rows, adapters=adapter), expected, strict=True):
        assert abs(float(value.target.mean() - mean)) <= 0.05
    values, _ = lm.score(rows, [adapter] * len(rows))
    values.mean().backward()
    assert {parameter.grad.dtype for parameter in adapter.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("given", "kind"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)],
)
def test_additions_are_multiplied_in_bfloat16_where_the_model_is(given, kind, make_lm):
    adapter = trained(make_lm("llama"))
    half = next(module for name, module in adapter.named_modules() if name.endswith("lora_A"))
    states = torch.randn(5, half.in_features).to(given)
    found = half(states)
    assert found.dtype == kind
    torch.testing.assert_close(found.float(), states.float() @ half.weight.T, atol=0.02, rtol=0.02)


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


def test_in_bfloat16_it_is_peft_s_forward_to_the_rounding(family, make_lm, tmp_path, monkeypatch):
    """peft multiplies the additions in float32, ours in bfloat16; both round the model's own products to bfloat16.

    Logits agree within 2 % of their norm, gradients within 4 %, and neither is twice as far from what float32 gives as
    peft's own. Without additions, logits would be a fifth of their norm off, or more.
    """
    monkeypatch.setitem(FAMILIES["mixtral"], "num_experts_per_tok", 4)  # all: rounding may choose another one
    lm = make_lm(family, dtype=torch.bfloat16)
    adapter = trained(lm)
    save_adapter(tmp_path / "a", "lora", adapter, lm, load_template("plain"))
    ids = torch.randint(5, 60, (3, 12), generator=torch.Generator().manual_seed(0))

    def run(model, parameters):
        """Return logits, and the gradient of a function of them with respect to the additions."""
        logits = model(ids).logits.float()
        gradients = torch.autograd.grad(logits.log_softmax(-1).square().mean(), parameters)
        return logits.detach(), torch.cat([gradient.flatten() for gradient in gradients])

    with adapter.applied():
        ours = run(lm.model, [parameter for _, parameter in sorted(adapter.named_parameters())])
    of_peft = []
    for dtype in (torch.bfloat16, torch.float32):
        rounded = build_family(family).to(torch.bfloat16).to(dtype)
        model = open_with_peft(rounded, tmp_path / "a")
        added = [(name, parameter) for name, parameter in model.named_parameters() if "lora_" in name]
        assert {parameter.dtype for _, parameter in added} == {torch.float32}
        trainable = [parameter.requires_grad_() for _, parameter in sorted(added)]
        of_peft.append(run(model.get_base_model(), trainable))
    halves, exact = of_peft
    for place, tolerance in enumerate((0.02, 0.04)):
        assert relative(ours[place], halves[place]) < tolerance
        assert relative(ours[place], exact[place]) < 2 * relative(halves[place], exact[place])
    assert relative(lm.model(ids).logits.float(), halves[0]) > 0.2


def test_dropout_acts_in_training_only(make_lm):
    lm = make_lm("llama")
    adapter = trained(lm, dropout=0.5)
    rows = rows_for(lm, adapter)

    def twice():
        return [torch.cat(targets(lm.log_probs(rows, adapters=adapter))) for _ in range(2)]

    assert torch.equal(*twice())
    adapter.train()
    assert not torch.equal(*twice())
    adapter.eval()
    assert torch.equal(*twice())


@pytest.mark.parametrize("hint", ["qpeft_a", "qpeft_r", "soft_prompt"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_together_with_a_prompt_adapter(family, hint, make_lm, tmp_path, monkeypatch):
    monkeypatch.setitem(FAMILIES, family, FAMILIES[family] | WIDE[family])  # as wide as the default options ask for
    lm = make_lm(family)
    adapter = trained(lm, hint=hint)
    rows = rows_for(lm, adapter)
    assert {key.partition(".")[0] for key in adapter.state_dict()} == {"model", "qpeft"}
    assert adapter.hint_length(3) == adapter.qpeft.hint_length(3)
    found = lm.log_probs(rows, adapters=adapter)
    with adapter.applied():
        expected = [naive_hinted_log_probs(lm.model, row, naive_hints(lm.model, adapter, row)) for row in rows]
    for value, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(value.target.double(), torch.tensor(reference).double(), atol=1e-4, rtol=0)
    values, _ = lm.score(rows, [adapter] * len(rows))
    values.mean().backward()
    for part in (adapter.model, adapter.qpeft):
        assert any(p.grad is not None and p.grad.abs().max() > 0 for p in part.parameters())

    save_adapter(tmp_path / "a", "lora", adapter, lm, load_template("plain"))
    other = make_lm(family)
    assert_same(targets(other.log_probs(rows, adapters=load_adapter(tmp_path / "a", other).adapter)), targets(found))
    open_with_peft(build_family(family), tmp_path / "a")
    assert "and vectors to its input" in (tmp_path / "a" / "README.md").read_text()


def test_which_layers(family, make_lm):
    names = {}
    for modules in ("all", "attention", "mlp"):
        lm = make_lm(family)
        names[modules] = layer_names(lora.build(lora.Config(modules=modules), lm))
    assert names["attention"] | names["mlp"] == names["all"]
    assert not names["attention"] & names["mlp"]
    ends = {modules: {name.rpartition(".")[2] for name in found} for modules, found in names.items()}
    assert ends["attention"] == ATTENTION.get(family, GATED[0])
    assert ends["mlp"] == MLP.get(family, GATED[1])
    assert not any("predictions" in name or "lm_head" in name for name in names["all"])
    within = {modules: {"attn" in name or "attention" in name for name in found} for modules, found in names.items()}
    assert (within["attention"], within["mlp"]) == ({True}, {False})


@pytest.mark.parametrize("modules", ["all", "attention", "mlp"])
@pytest.mark.parametrize(("family", "layers"), [("bert", "num_hidden_layers"), ("gpt2", "n_layer")])
def test_deep_models(family, layers, modules, make_lm, monkeypatch, tmp_path):
    """From twenty layers on, peft shortens their list to tails of names, which must not reach others."""
    monkeypatch.setitem(FAMILIES, family, FAMILIES[family] | {layers: 12})
    lm = make_lm(family)
    adapter = lora.build(lora.Config(modules=modules, r=1), lm)
    count = {"bert": {"all": 6, "attention": 4, "mlp": 2}, "gpt2": {"all": 4, "attention": 2, "mlp": 2}}
    assert len(layer_names(adapter)) == 12 * count[family][modules]
    assert {("attention" in n or "attn" in n) for n in layer_names(adapter)} == {
        "all": {True, False}, "attention": {True}, "mlp": {False},
    }[modules]  # fmt: skip
    save_adapter(tmp_path / "a", "lora", adapter, lm, load_template("plain"))
    opened = open_with_peft(build_family(family), tmp_path / "a")
    stored = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert set(peft.get_peft_model_state_dict(opened, save_embedding_layers=False)) == set(stored)


def test_layers_by_name(make_lm):
    lm = make_lm("llama")
    lora.build(lora.Config(), lm)  # names are those of the model, whatever has been put into it
    some = lora.build(lora.Config(modules="up_proj, layers.1.mlp.gate_proj"), lm)
    expected = {f"model.layers.{i}.mlp.up_proj" for i in (0, 1)} | {"model.layers.1.mlp.gate_proj"}
    assert layer_names(some) == expected


def test_rank_scale_and_size(make_lm):
    lm = make_lm("llama")
    for r in (1, 4):
        adapter = lora.build(lora.Config(r=r, modules="o_proj", alpha_per_rank=3.0), lm)
        assert adapter.count_parameters() == 2 * r * (32 + 32)
        assert adapter.peft_facts()["lora_alpha"] == 3 * r
    assert set(adapter.state_dict()) == {
        f"model.model.layers.{i}.self_attn.o_proj.lora_{half}.weight" for i in (0, 1) for half in "AB"
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "--r is 0"),
        ({"alpha_per_rank": 0.0}, "--alpha-per-rank is 0.0"),
        ({"dropout": 1.0}, "--dropout is 1.0"),
        ({"modules": "upp_proj"}, "'upp_proj'; did you mean 'up_proj'"),
        ({"modules": "w.q"}, r"is named 'w\.q'; known: down_proj"),
        ({"modules": " , "}, "--modules is empty"),
        ({"hint": "qpeft_c"}, "--hint qpeft_c: it reads the model's own states"),
        ({"hint": "qpeft_a"}, "--attn-dim 64"),
        ({"hint": "lora"}, "--hint lora"),
        ({"hint": "soft_promt"}, "did you mean 'soft_prompt'"),
    ],
)
def test_options_that_cannot_be(make_lm, options, message, monkeypatch):
    if options.get("hint") == "qpeft_c":
        monkeypatch.setitem(FAMILIES, "llama", FAMILIES["llama"] | WIDE["llama"])
    lm = make_lm("llama")
    with pytest.raises(OptionError, match=message):
        lora.build(lora.Config(**options), lm)
    assert not hasattr(lm.model, "peft_config"), "the model is as it was"


def test_architectures_and_experts(make_lm):
    model = MambaForCausalLM(MambaConfig(vocab_size=320, hidden_size=32, num_hidden_layers=1, state_size=4))
    lm = CausalLM(model, wordpiece_tokenizer(), name="a mamba", max_length=128, batch_tokens=4096)
    with pytest.raises(OptionError, match="'mamba' is not known; name its linear layers: in_proj, x_proj"):
        lora.build(lora.Config(), lm)
    assert layer_names(lora.build(lora.Config(modules="in_proj"), lm)) == {"backbone.layers.0.mixer.in_proj"}
    with pytest.raises(OptionError, match="experts are changed; or take --modules attention"):
        lora.build(lora.Config(dropout=0.1), make_lm("mixtral"))
    lora.build(lora.Config(dropout=0.1, modules="attention"), make_lm("mixtral"))


@pytest.mark.parametrize("modules", ["all", "attention", "mlp", "q_proj,v_proj"])
def test_of_a_model_that_also_sees_the_text_decoder_is_trained(modules):
    text = {**SMALL_GATED, "head_dim": 8, "sliding_window": 12, "query_pre_attn_scalar": 8, **SPECIAL}
    seen = {
        "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 28,
        "patch_size": 14,
    }  # fmt: skip
    model = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=seen, mm_tokens_per_image=1))
    lm = CausalLM(model.eval(), wordpiece_tokenizer(), name="gemma3", max_length=128, batch_tokens=4096)
    adapter = trained(lm, modules=modules)
    lm.score(rows_for(lm, adapter, "plain"), [adapter] * len(rows_for(lm, adapter, "plain")))[0].sum().backward()
    assert all(parameter.grad is not None for parameter in adapter.parameters())
    assert {place.layer for place in adapter.places()} == {0, 1}
    assert sum(adapter.places().values()) == adapter.count_parameters()


def test_without_peft(make_lm, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'qpeft\[lora\]'"):
        lora.build(lora.Config(), make_lm("llama"))


def test_a_template_without_a_place_for_hints(make_lm):
    lm = make_lm("llama")
    bare = Template("bare", 1, "{passage}", "{query}")
    adapter = trained(lm)
    assert rows_for(lm, adapter, bare)[0].hint is None
    with pytest.raises(OptionError, match="no place for a hint"):
        Prompt(bare, lm.tokenizer, 128, hint_length=trained(lm, hint="soft_prompt").hint_length)


def test_folders(make_lm, tmp_path):
    lm = make_lm("llama")
    adapter = trained(lm, modules="attention", r=2)
    save_adapter(tmp_path / "a", "lora", adapter, lm, load_template("upr"), max_passage_tokens=9)
    described = read_config(tmp_path / "a")
    assert (described["adapter"], described["options"]["r"], described["peft_type"]) == ("lora", 2, "LORA")
    config = peft.PeftConfig.from_pretrained(tmp_path / "a")
    assert isinstance(config, peft.LoraConfig)
    assert (config.r, config.lora_alpha, config.inference_mode) == (2, 4, True)
    assert config.base_model_name_or_path == "tiny-llama"
    names = set(load_file(tmp_path / "a" / "adapter_model.safetensors"))
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in names
    assert len(names) == 2 * 2 * 4

    other = make_lm("llama")
    present = trained(other, seed=5)  # a model that already has one
    rows = rows_for(lm, adapter)
    before = targets(other.log_probs(rows, adapters=present))
    opened = load_adapter(tmp_path / "a", other)
    assert (opened.name, opened.template, opened.max_passage_tokens) == ("lora", load_template("upr"), 9)
    assert not any(parameter.requires_grad for parameter in opened.adapter.parameters())
    expected = targets(lm.log_probs(rows, adapters=adapter))
    assert_same(targets(other.log_probs(rows, adapters=opened.adapter)), expected)
    assert_same(targets(other.log_probs(rows, adapters=present)), before)
    assert_same(targets(other.log_probs(rows)), targets(make_lm("llama").log_probs(rows)))
    again = load_adapter(tmp_path / "a", other)
    assert_same(targets(other.log_probs(rows, adapters=again.adapter)), expected)


def test_folders_that_are_refused(make_lm, tmp_path):
    lm = make_lm("llama")
    save_adapter(tmp_path / "a", "lora", trained(lm), lm, load_template("plain"))
    with pytest.raises(AdapterError, match="was trained for 'tiny-llama', not for 'tiny-mistral'"):
        load_adapter(tmp_path / "a", make_lm("mistral"))
    (tmp_path / "a" / "qpeft.json").write_text("{")
    with pytest.raises(AdapterError, match=r"qpeft\.json: not readable"):
        load_adapter(tmp_path / "a", lm)
    (tmp_path / "a" / "qpeft.json").unlink()
    with pytest.raises(AdapterError, match=r"not an adapter of qpeft \(peft_type 'LORA'"):
        load_adapter(tmp_path / "a", lm)


def test_train_and_rerank(saved_model, tmp_path, capsys):
    lines = [
        {"query": query.text, "pos": [PASSAGES[i].text], "neg": [PASSAGES[3].text, PASSAGES[2].text]}
        for i, query in enumerate(QUERIES)
    ]
    (tmp_path / "groups.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = ["train", "--adapter", "lora", "--train-file", str(tmp_path / "groups.jsonl"), "--model",
                 str(saved_model), "--dtype", "float32", "--output", str(tmp_path / "out"), "--seed", "3",
                 "--epochs", "2", "--r", "2", "--modules", "mlp", "--batch-queries", "2"]  # fmt: skip
    assert main(arguments) == 0
    assert "lora: 960 trained parameters" in capsys.readouterr().err
    start = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert any(tensor.abs().max() > 0 for name, tensor in start.items() if "lora_B" in name), "it has learned"
    assert main(arguments) == 0
    again = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in start.items())

    reranker = load_reranker(str(saved_model), adapter=str(tmp_path / "out"), dtype="float32")
    plain = load_reranker(str(saved_model), dtype="float32")
    pairs = [(query.text, passage.text) for query in QUERIES for passage in PASSAGES]
    assert all(one != other for one, other in zip(reranker.predict(pairs), plain.predict(pairs), strict=True))


@pytest.mark.parametrize(
    ("text", "layers"), [("0", {0}), ("1", {1}), ("0-1", {0, 1}), (" 1 , 0", {0, 1}), ("", {0, 1}), ("1-1", {1})]
)
def test_some_layers_of_the_model(family, make_lm, text, layers):
    lm = make_lm(family)
    found = layer_names(lora.build(lora.Config(layers=text), lm))
    assert {int(next(part for part in name.split(".") if part.isdigit())) for name in found} == layers
    whole = layer_names(lora.build(lora.Config(), make_lm(family)))
    assert len(found) == len(whole) * len(layers) // 2


def test_a_range_of_a_deep_model(make_lm, monkeypatch, tmp_path):
    monkeypatch.setitem(FAMILIES, "llama", FAMILIES["llama"] | {"num_hidden_layers": 12})
    lm = make_lm("llama")
    adapter = trained(lm, layers="1-3,11", modules="mlp")
    assert {name.split(".")[2] for name in layer_names(adapter)} == {"1", "2", "3", "11"}
    save_adapter(tmp_path / "a", "lora", adapter, lm, load_template("plain"))
    opened = open_with_peft(build_family("llama"), tmp_path / "a")
    stored = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert set(peft.get_peft_model_state_dict(opened, save_embedding_layers=False)) == set(stored)


def test_alpha_of_ones_own(make_lm):
    lm = make_lm("llama")
    for r in (1, 4):
        adapter = lora.build(lora.Config(r=r, alpha=64.0), lm)
        assert adapter.peft_facts()["lora_alpha"] == 64
        assert {layer.scaling[adapter.label] for layer in adapter._layers.values()} == {64 / r}
    adapter = lora.build(lora.Config(r=1, alpha=2.5), lm)
    assert adapter.peft_facts()["lora_alpha"] == 2.5
    assert {layer.scaling[adapter.label] for layer in adapter._layers.values()} == {2.5}


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma2", "gpt2", "gpt_neox"])
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
def test_peft_opens_a_classifier(family, make_lm, tmp_path):
    lm = make_lm(family)
    adapter = lora.build(lora.Config(r=2), lm)
    adapter.add_head(lm)
    assert adapter.count_parameters() == sum(tensor.numel() for tensor in adapter.state_dict().values())
    assert abs(float(adapter.head.module.weight.detach().std()) - 0.02) < 0.01, (
        "it starts as transformers would start it"
    )
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    save_adapter(tmp_path / "a", "lora", adapter, lm, load_template("rankllama"), method="classifier")
    scorer = open_scorer(make_lm(family), tmp_path / "a")
    pairs = [(query, passage) for query in QUERIES for passage in PASSAGES]
    config = type(lm.model.config)(**{**FAMILIES[family], **SPECIAL, "num_labels": 1})
    base = AutoModelForSequenceClassification.from_config(config)
    base.base_model.load_state_dict(make_lm(family).model.base_model.state_dict())
    model = peft.PeftModel.from_pretrained(base, tmp_path / "a").eval()
    assert type(model) is peft.PeftModelForSequenceClassification
    with torch.no_grad():
        found = [float(model(input_ids=torch.tensor([row.context])).logits) for row in scorer.prepare(pairs).rows]
    assert scorer.score(pairs) == pytest.approx(found, abs=1e-4)
    assert torch.equal(model.base_model.model.score.modules_to_save["default"].weight, adapter.head.module.weight)


def test_peft_opens_an_adapter_that_answers(make_lm, tmp_path):
    lm = make_lm("llama")
    adapter = trained(lm)
    save_adapter(tmp_path / "a", "lora", adapter, lm, load_template("yes_no"), method="yes_no")
    scorer = open_scorer(lm, tmp_path / "a")
    pairs = [(query, passage) for query in QUERIES for passage in PASSAGES]
    model = open_with_peft(build_family("llama"), tmp_path / "a")
    yes, no = lm.tokenizer.convert_tokens_to_ids(["yes", "no"])
    with torch.no_grad():
        logits = [model(input_ids=torch.tensor([row.context])).logits[0, -1] for row in scorer.prepare(pairs).rows]
    assert scorer.score(pairs) == pytest.approx([float(each[yes] - each[no]) for each in logits], abs=1e-4)


def test_the_revision_of_the_base_is_told_to_peft(make_lm):
    lm = make_lm("llama")
    lm.model.config._commit_hash = "aaaa1111"
    facts = lora.build(lora.Config(), lm).peft_facts()
    assert (facts["base_model_name_or_path"], facts["revision"]) == ("tiny-llama", "aaaa1111")


def test_additions_are_given_the_states_as_they_are(make_lm):
    lm = make_lm("llama", dtype=torch.bfloat16)
    adapter, kinds = trained(lm), set()
    for name, module in adapter.named_modules():
        if name.endswith("lora_A"):
            module.register_forward_pre_hook(lambda _, given: kinds.add(given[0].dtype))
    lm.log_probs(rows_for(lm, adapter)[:1], adapters=adapter)
    assert kinds == {torch.bfloat16}


def test_layers_that_cannot_be_changed_together(make_lm):
    model = make_lm("gpt2").model
    model.transformer.h[0].extra = torch.nn.Linear(4, 4)
    with pytest.raises(OptionError, match="hold their weights in different orders"):
        resolve("c_attn,extra", model)
    model = make_lm("mixtral").model
    for layer in model.model.layers:
        layer.mlp.experts = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(2))
    with pytest.raises(OptionError, match="this model's experts are not stacked tensors; take attention"):
        resolve("mlp", model)
    assert resolve("attention", model).layers
