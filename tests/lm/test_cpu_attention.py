import pytest
import torch
from test_causal import assert_close, rows_for
from test_context_store import with_store
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM
from transformers.masking_utils import eager_mask

from qpeft.adapters import lora
from qpeft.errors import OptionError
from qpeft.lm import cpu_attention, past
from qpeft.lm.cpu_attention import Contexts
from qpeft.lm.past import ApartLayer
from qpeft.loading import load_lm
from qpeft.model_config import ModelConfig
from reference import naive_log_probs
from tiny_models import GATED, wordpiece_tokenizer


@pytest.fixture(params=[1, 2000, cpu_attention.SCORES], ids=["row by row", "a few rows", "all rows"])
def at_a_time(request, monkeypatch):
    """Scores that are held at a time, and bytes of contexts that are joined."""
    monkeypatch.setattr(cpu_attention, "SCORES", request.param)
    monkeypatch.setattr(cpu_attention, "JOINED", request.param)


@pytest.fixture(params=[False, True], ids=["own", "fused where not padded"])
def tiles(request, monkeypatch):
    """Whether the processor is one that PyTorch's fused attention is left to."""
    monkeypatch.setattr(cpu_attention, "TILES", request.param)


@pytest.mark.usefixtures("at_a_time", "tiles")
@pytest.mark.parametrize("side", ["left", "right"])
def test_scores_equal_the_naive_reference(family, make_lm, side):
    lm = make_lm(family, padding_side=side)
    rows = rows_for(lm)
    assert max(map(len, rows)) > 12, "longer than the sliding window, so that it bites"
    references = [naive_log_probs(lm.model, row) for row in rows]
    lm.model.set_attn_implementation(cpu_attention.NAME)
    assert_close(lm.log_probs(rows), references)
    stored = with_store(lm)
    for _ in range(2):
        assert_close(stored.log_probs(rows), references)


def test_without_padding_no_mask_is_made_where_the_fused_kernel_takes_over(make_lm, monkeypatch):
    lm = make_lm("llama", padding_side="right")
    lm.model.set_attn_implementation(cpu_attention.NAME)
    given = []
    own = cpu_attention.scaled_dot_product_attention
    monkeypatch.setattr(
        cpu_attention, "scaled_dot_product_attention", lambda *args, **kw: given.append(kw) or own(*args, **kw)
    )
    for tiles in (False, True):
        monkeypatch.setattr(cpu_attention, "TILES", tiles)
        lm.log_probs(rows_for(lm))
        assert bool(given) == tiles


def test_long_rows_have_the_same_gradients_from_the_fused_kernel(make_lm, monkeypatch):
    lm = make_lm("llama", padding_side="right")
    lm.model.set_attn_implementation(cpu_attention.NAME)
    monkeypatch.setattr(cpu_attention, "TILES", True)
    adapter = lora.build(lora.Config(r=2), lm)
    for name, parameter in adapter.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    rows = rows_for(lm)
    fused = []
    own = cpu_attention.scaled_dot_product_attention
    monkeypatch.setattr(
        cpu_attention, "scaled_dot_product_attention", lambda *args, **kw: fused.append(kw) or own(*args, **kw)
    )
    found = []
    for long in (10**6, 1):
        monkeypatch.setattr(cpu_attention, "LONG", long)
        assert not fused
        adapter.zero_grad()
        values, _ = lm.score(rows, [adapter] * len(rows))
        values.sum().backward()
        found.append([values.detach(), *(parameter.grad.clone() for parameter in adapter.parameters())])
    assert fused
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_contexts_are_joined_by_attention_or_before_it(make_lm, monkeypatch):
    lm = make_lm("llama")
    rows = rows_for(lm)
    references = [naive_log_probs(lm.model, row) for row in rows]
    lm.model.set_attn_implementation(cpu_attention.NAME)
    own_stacked, stacked = past._stacked, []
    monkeypatch.setattr(past, "_stacked", lambda *args: stacked.append(args) or own_stacked(*args))
    assert_close(with_store(lm).log_probs(rows), references)
    assert len(stacked) == 1, "to try whether the results are the same"
    own_update = ApartLayer.update
    monkeypatch.setattr(ApartLayer, "update", lambda *args: tuple(part.clone() for part in own_update(*args)))
    assert_close(with_store(lm).log_probs(rows), references)
    assert len(stacked) > 3, "a layer that changes the cache's keys does not hand on their contexts"


@pytest.mark.parametrize("most", [1, 20_000, 2**21, None])
def test_contexts_fit_together(most):
    torch.manual_seed(0)
    rows = [torch.randn(2, 3, length, 4) for length in (5, 90, 1, 40, 41)]
    key, value = torch.randn(2, 5, 3, 6, 4)
    seen = []
    for some, keys, values in Contexts(rows).joined(key, value, most):
        assert keys.shape == values.shape
        assert keys.shape[2] % cpu_attention.MULTIPLE == 0
        for i, row in enumerate(range(some.start, some.stop)):
            seen.append(row)
            for joined, before, after in ((keys, rows[row][0], key), (values, rows[row][1], value)):
                whole = torch.cat([before, after[row]], 1)
                assert torch.equal(joined[i, :, -whole.shape[1] :], whole)
                assert not joined[i, :, : -whole.shape[1]].any()
    assert seen == [0, 1, 2, 3, 4]


def test_gradients_equal_those_of_eager_attention(make_lm):
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 4, 4, 9, 8).unbind()
    key, value = key[:, :2], value[:, :2]
    mask = torch.zeros(4, 1, 9, 9).masked_fill(torch.ones(9, 9).triu(1).bool(), -1e9)
    own, eager = [], []
    for found in (own, eager):
        leaves = [part.clone().requires_grad_() for part in (query, key, value)]
        if found is own:
            layer = torch.nn.Module()
            layer.is_causal = True
            out = cpu_attention.attention(layer, *leaves, mask, softcap=2.0)[0]
        else:
            keys, values = (part.repeat_interleave(2, 1) for part in leaves[1:])
            scores = torch.tanh(leaves[0] @ keys.transpose(2, 3) * 8**-0.5 / 2) * 2 + mask
            out = (scores.softmax(-1) @ values).transpose(1, 2)
        (out * torch.arange(9)[:, None, None]).sum().backward()
        found += [out, *(leaf.grad for leaf in leaves)]
    for one, other in zip(own, eager, strict=True):
        torch.testing.assert_close(one, other)


def test_gradients_over_contexts_equal_those_of_eager_attention():
    torch.manual_seed(0)
    rows = [torch.randn(2, 2, length, 8) for length in (5, 40, 1, 33)]
    query, key, value = torch.randn(4, 4, 9, 8), torch.randn(4, 2, 9, 8), torch.randn(4, 2, 9, 8)
    mask = torch.full((4, 1, 9, 49), -1e9)
    for row, context in zip(mask, rows, strict=True):
        row[:, :, 40 - context.shape[2] :] = torch.zeros(9, 9 + context.shape[2]).masked_fill(
            ~torch.ones(9, 9 + context.shape[2], dtype=torch.bool).tril(context.shape[2]), -1e9
        )
    own, eager = [], []
    for found in (own, eager):
        leaves = [part.clone().requires_grad_() for part in (query, key, value)]
        if found is own:
            keys = leaves[1].view_as(key)
            keys.contexts = Contexts(rows)
            out = cpu_attention.attention(torch.nn.Module(), leaves[0], keys, leaves[2], mask)[0]
        else:
            out = []
            for i, context in enumerate(rows):
                keys, values = (torch.cat([context[j], leaves[1 + j][i]], 1).repeat_interleave(2, 0) for j in (0, 1))
                scores = leaves[0][i] @ keys.mT * 8**-0.5 + mask[i, :, :, 40 - context.shape[2] :]
                out.append((scores.softmax(-1) @ values).transpose(0, 1))
            out = torch.stack(out)
        (out * torch.arange(9)[:, None, None]).sum().backward()
        found += [out, *(leaf.grad for leaf in leaves)]
    for one, other in zip(own, eager, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def save(folder, model):
    model.save_pretrained(folder)
    wordpiece_tokenizer().save_pretrained(folder)
    return str(folder)


def test_it_is_what_cpus_use_unless_told_otherwise(saved_model):
    chosen = {name: load_lm(ModelConfig(str(saved_model), attention_kernel=name)) for name in ("auto", "eager")}
    used = {name: lm.model.config._attn_implementation for name, lm in chosen.items()}
    assert used == {"auto": cpu_attention.NAME, "eager": "eager"}
    with pytest.raises(OptionError, match="--attention-kernel flush: "):
        load_lm(ModelConfig(str(saved_model), attention_kernel="flush"))


def test_a_kernel_that_fails_is_named(saved_model):
    def halves_only(module, query, *args, **kwargs):
        raise RuntimeError("it only supports fp16 and bf16 data type")  # as flash attention does

    AttentionInterface.register("halves_only", halves_only)
    AttentionMaskInterface.register("halves_only", eager_mask)
    with pytest.raises(OptionError, match="--attention-kernel halves_only: it only supports fp16 and bf16"):
        load_lm(ModelConfig(str(saved_model), attention_kernel="halves_only"))


def test_layers_that_need_more_keep_their_own_attention(tmp_path):
    config = AutoConfig.for_model("gpt_oss", **GATED, head_dim=8, num_local_experts=2, num_experts_per_tok=1)
    torch.manual_seed(0)
    folder = save(tmp_path, AutoModelForCausalLM.from_config(config))
    lm = load_lm(ModelConfig(folder, dtype="float32"))
    assert lm.model.config._attn_implementation == "eager"
    rows = rows_for(lm)
    assert_close(lm.log_probs(rows), [naive_log_probs(lm.model, row) for row in rows])
    with pytest.raises(OptionError, match=f"--attention-kernel {cpu_attention.NAME}: .* knows no s_aux"):
        load_lm(ModelConfig(folder, attention_kernel=cpu_attention.NAME))
