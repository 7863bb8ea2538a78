"""Language models to measure: the embedded one, or random weights in the shape of a public configuration.

Speed and memory depend on the shape alone. All of them are read with the embedded model's tokenizer, so that a text
has the same tokens for each.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from qpeft.lm.causal import CausalLM
from qpeft.loading import load_lm, model_path
from qpeft.model_config import EMBEDDED, ModelConfig

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "model_type": "qwen3", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 30_522,
        "tie_word_embeddings": True, "initializer_range": 0.2,
    },
    "qwen3-0.6b": {
        "model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936,
        "tie_word_embeddings": True,
    },
    "mistral-7b": {
        "model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32_000,
    },
    "llama-3.1-8b": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128_256, "rope_theta": 500_000.0,
    },
    "llama-128k-head": {
        "model_type": "llama", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128_256, "tie_word_embeddings": True,
    },
    "t5-small": {
        "model_type": "t5", "d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_heads": 8,
        "vocab_size": 32_128, "decoder_start_token_id": 0,
    },
}  # fmt: skip
"""Public configurations, and two small ones: `tiny`, with weights so large that a mistake shows in the scores, to try a
benchmark; `llama-128k-head` for a large head alone."""

MAX_LENGTH = 512
"""Tokens that every model measured may read; no pair of the benchmarks has more."""


def random_model(shape: str, device: str = "cpu", dtype: torch.dtype = torch.bfloat16) -> Any:
    """Return a model with random weights, made on the device."""
    facts = dict(SHAPES[shape])
    config = AutoConfig.for_model(facts.pop("model_type"), **facts)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    torch.manual_seed(0)
    with torch.device(device):
        return auto.from_config(config, dtype=dtype)


def model_folder(shape: str, folder: Path) -> str:
    """Return the embedded model's folder, or write a random model into `folder` and return that."""
    if shape == EMBEDDED:
        return model_path(EMBEDDED)
    random_model(shape).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_path(EMBEDDED)).save_pretrained(folder)
    return str(folder)


def open_lm(shape: str, device: str) -> CausalLM:
    """Return the embedded model, or a random one of a shape that no file holds; bf16."""
    if shape == EMBEDDED:
        lm: Any = load_lm(ModelConfig(EMBEDDED, device=device, dtype="bfloat16"))
        return lm
    tokenizer = AutoTokenizer.from_pretrained(model_path(EMBEDDED))
    return CausalLM(random_model(shape, device), tokenizer, name=shape, max_length=MAX_LENGTH, batch_tokens=65_536)
