"""Architectures whose attention, positions or memory are unlike what saves work elsewhere: scored right, or refused."""

import pytest
import torch
from test_causal import QUERY, assert_close, rows_for

from qpeft.errors import ModelError, OptionError, PassageCacheError
from qpeft.lm.agreement import agree
from qpeft.loading import _name_of_contexts, load_lm
from qpeft.model_config import ModelConfig
from qpeft.template import Prompt, load_template
from qpeft.types import Passage
from reference import naive_hinted_log_probs, naive_hints, naive_log_probs
from tiny_adapters import build
from tiny_adapters import rows_for as rows_of
from tiny_models import GATED, SMALL, VOCABULARY, build_family, wordpiece_tokenizer

LATENT = {
    **GATED, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "moe_intermediate_size": 16, "first_k_dense_replace": 1,
}  # fmt: skip
SHARING = {
    **GATED, "head_dim": 8, "sliding_window": 8, "num_hidden_layers": 4, "num_kv_shared_layers": 2,
    "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}  # fmt: skip
KEEPING = {
    # makes its own mask, for the last positions that there are
    "gpt_neo": {
        "vocab_size": VOCABULARY, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "window_size": 8,
        "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 128, "intermediate_size": 48,
    },
    "falcon": {**SMALL, "max_position_embeddings": 128, "multi_query": True},  # layers need an argument that is None
    "diffllama": GATED,  # changes values between the cache and attention
    "doge": GATED,  # attention that does not say whether it is causal
    "opt": {**SMALL, "ffn_dim": 48, "max_position_embeddings": 128, "word_embed_proj_dim": 32},
    "cohere2": {**GATED, "sliding_window": 8},
}  # fmt: skip
NOT_KEEPING = {
    "deepseek_v2": LATENT,  # rotations as complex numbers; keys are wider than values
    "deepseek_v3": LATENT,
    "gemma3n_text": {**SHARING, "laurel_rank": 4, "activation_sparsity_pattern": [0.0] * 4},  # layers share keys
    "gemma4_text": {**SHARING, "global_head_dim": 16},  # heads of two sizes
    "lfm2": {**GATED, "layer_types": ["conv", "full_attention"]},
    # count positions by themselves, whatever they are given
    "roformer": {
        **SMALL,
        "intermediate_size": 48,
        "embedding_size": 32,
        "max_position_embeddings": 128,
        "is_decoder": True,
    },
    "bart": {
        "vocab_size": VOCABULARY,
        "d_model": 32,
        "decoder_layers": 2,
        "decoder_attention_heads": 4,
        "decoder_ffn_dim": 48,
        "encoder_layers": 2,  # must be as many
        "max_position_embeddings": 128,
    },
}


def save(name, folder, **options):
    """Write a tiny model of an architecture with a tokenizer, and return the folder's name."""
    settings = {**KEEPING, **NOT_KEEPING}.get(name, {})
    build_family(name, **{**settings, **options}).save_pretrained(folder)
    wordpiece_tokenizer().save_pretrained(folder)
    return str(folder)


def opened(folder, **options):
    return load_lm(ModelConfig(folder, dtype="float32", device="cpu", **options))


@pytest.mark.parametrize("name", [*KEEPING, *NOT_KEEPING])
def test_scores_are_the_naive_reference_s(name, tmp_path):
    folder = save(name, tmp_path)
    lm = opened(folder)
    rows = rows_for(lm)
    expected = [naive_log_probs(lm.model, row) for row in rows]
    assert_close(lm.log_probs(rows), expected)
    if name in NOT_KEEPING:
        with pytest.raises(PassageCacheError, match="the passage cache is for models whose layers are all attention"):
            opened(folder, passage_cache=0.1)
    else:
        kept = opened(folder, passage_cache=0.1)
        assert_close(kept.log_probs(rows), expected)
        assert kept.store.hits + kept.store.misses > 0


@pytest.mark.parametrize("name", [*KEEPING, *NOT_KEEPING])
def test_states_are_read_where_they_are_kept(name, tmp_path):
    lm = opened(save(name, tmp_path))
    if name in NOT_KEEPING:
        with pytest.raises(OptionError, match=r"goes on from encoded passages, which .* cannot"):
            build("qpeft_c", lm)
        return
    for layer in (-1, 1):
        adapter = build("qpeft_c", lm, trained=True, layer=layer)
        rows = rows_of(lm, adapter, "qpeft")
        for row, found in zip(rows, lm.log_probs(rows, adapters=adapter), strict=True):
            expected = naive_hinted_log_probs(lm.model, row, naive_hints(lm.model, adapter, row))
            assert found.target.tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("name", ["gemma3n_text", "gemma4_text"])
def test_models_that_look_tokens_up_in_every_layer_know_them_beside_a_hint(name, tmp_path):
    lm = opened(save(name, tmp_path))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in lm.model.parameters():
            if not parameter.any():  # which would leave these states out
                parameter.normal_(std=0.5)
    adapter = build("soft_prompt", lm, trained=True)
    rows = rows_of(lm, adapter, "qpeft")[:4]
    alone = lm.log_probs(rows)
    mixed = lm.log_probs(rows, adapters=[None, adapter, None, adapter])
    for place in (0, 2):
        torch.testing.assert_close(mixed[place].target, alone[place].target, atol=1e-4, rtol=0)
    for place in (1, 3):
        expected = naive_hinted_log_probs(lm.model, rows[place], naive_hints(lm.model, adapter, rows[place]))
        assert mixed[place].target.tolist() == pytest.approx(expected, abs=1e-4)
        assert (mixed[place].target - alone[place].target).abs().max() > 1e-3


def test_the_last_states_may_be_of_another_size(tmp_path):
    lm = opened(save("opt", tmp_path, word_embed_proj_dim=16))
    adapter = build("lora", lm, modules="q_proj,v_proj")
    adapter.add_head(lm)
    prompt = Prompt(load_template("rankllama"), lm.tokenizer, lm.max_length)
    (row,) = prompt.rows(QUERY, Passage("p", "the sky is blue"))
    (found,) = lm.read([row], adapter.head, adapters=adapter)
    with torch.no_grad():
        state = lm.model.base_model(input_ids=torch.tensor([row.context])).last_hidden_state[0, -1]
        torch.testing.assert_close(found, adapter.head.module(state), atol=1e-5, rtol=0)
    adapter = build("qpeft_c", lm, trained=True)
    rows = rows_of(lm, adapter, "qpeft")
    for row, found in zip(rows, lm.log_probs(rows, adapters=adapter), strict=True):
        expected = naive_hinted_log_probs(lm.model, row, naive_hints(lm.model, adapter, row))
        assert found.target.tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("level", [0, -100])
def test_what_all_logits_have_in_common_is_no_agreement(dtype, level):
    torch.manual_seed(0)
    said, other = torch.randn(2, 3, 320) * 2, torch.randn(2, 3, 320) * 2
    logits = (said + level).to(dtype)
    assert agree(logits, logits.clone(), None)
    assert agree(logits, (said * (1 + torch.finfo(dtype).eps) + level).to(dtype), None)
    assert not agree(logits, (other + level).to(dtype), None)
    assert agree(logits, logits + 4, None), "which tells no words apart"


@pytest.mark.parametrize(("name", "spared"), [("gpt_neo", False), ("falcon", True), ("deepseek_v2", True)])
def test_the_last_layer_is_spared_where_that_works(name, spared, tmp_path):
    assert opened(save(name, tmp_path)).spares_last_layer == spared


def test_padding_may_reach_further_than_there_are_positions(tmp_path):
    build_family("gpt2", n_positions=41).save_pretrained(tmp_path)
    wordpiece_tokenizer().save_pretrained(tmp_path)
    passage = Passage("long", "the light of the sky is blue and the sea is salty " * 10)
    for cache in (None, 0.1):
        lm = opened(str(tmp_path), passage_cache=cache)
        rows = Prompt(load_template("plain"), lm.tokenizer, lm.max_length).rows(QUERY, passage)
        assert len(rows[0]) == 41
        assert_close(lm.log_probs(rows), [naive_log_probs(lm.model, row) for row in rows])


def test_positions_that_do_not_start_at_0_are_refused(tmp_path):
    folder = save("roberta", tmp_path, **SMALL, intermediate_size=48, max_position_embeddings=130, is_decoder=True)
    with pytest.raises(ModelError, match="does not number its positions from 0"):
        opened(folder)


def test_contexts_of_quantised_weights_are_kept_apart(saved_model):
    lm, names = opened(str(saved_model)), set()
    for lm.quantization in ("none", "8bit", "4bit"):
        names.add(_name_of_contexts(lm, ModelConfig(str(saved_model))))
    assert len(names) == 3


def test_rows_stay_within_the_first_of_two_sets_of_rotations(tmp_path):
    rotations = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    options = {**GATED, "original_max_position_embeddings": 32, "rope_parameters": rotations}
    folder = save("phi3", tmp_path, **options)
    assert (opened(folder).max_length, opened(folder, max_length=100).max_length) == (32, 100)
    assert opened(folder, max_length=20).max_length == 20
