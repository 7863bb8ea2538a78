"""Tiny random models of nine families and tokenizers of three kinds, built in memory.

Each family earns its place: gpt2 has learned positions, gemma2 caps its logits, mistral slides its window, qwen3
normalises queries and keys, mixtral routes, bert is an encoder turned decoder. The weights are scaled up so that a
mistake shows in the scores.
"""

from __future__ import annotations

import os
import shutil
import sys

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
)

VOCABULARY = 320
SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GATED = {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 128}
FAMILIES = {
    "llama": GATED,
    "mistral": {**GATED, "sliding_window": 12},
    "qwen3": {**GATED, "head_dim": 8},
    "gemma2": {
        **GATED,
        "head_dim": 8,
        "sliding_window": 12,
        "final_logit_softcapping": 0.5,
        "attn_logit_softcapping": 5.0,
        "query_pre_attn_scalar": 8,
    },
    "gpt2": {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "gpt_neox": {**SMALL, "intermediate_size": 48, "max_position_embeddings": 128},
    "mixtral": {**GATED, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "bert": {**SMALL, "intermediate_size": 48, "max_position_embeddings": 128, "is_decoder": True},
}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WORDS = (
    "the",
    "a",
    "of",
    "in",
    "is",
    "was",
    "what",
    "why",
    "who",
    "how",
    "passage",
    "question",
    "please",
    "write",
    "based",
    "on",
    "this",
    "query",
    ":",
    ".",
    ",",
    "?",
    "sky",
    "blue",
    "sea",
    "salty",
    "octopus",
    "heart",
    "three",
    "light",
    "air",
    "moon",
    "tide",
    "water",
    "cat",
    "dog",
    "river",
    "lake",
    "city",
    "king",
    "year",
    "people",
    "made",
    "first",
    "given",
    "hints",
    "generate",
    "for",
    "input",
    "lion",
    "old",
    "new",
    "red",
    "green",
    "long",
    "short",
)


def build_family(family: str, **options: object) -> torch.nn.Module:
    """Return a fresh random model of a family, the same every time; `options` change its configuration."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**FAMILIES.get(family, {}), **SPECIAL, **options})
    for name in list(config.to_dict()):
        if "drop" in name and isinstance(getattr(config, name), float):
            setattr(config, name, 0.0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return model.eval()


def can_compile() -> bool:
    """Return whether torch finds a C++ compiler here."""
    default = "clang++" if sys.platform == "darwin" else "g++"
    return shutil.which(os.environ.get("CXX", default)) is not None


def wordpiece_tokenizer() -> PreTrainedTokenizerFast:
    """Return a BERT-like tokenizer that knows some words and all letters."""
    letters = list("abcdefghijklmnopqrstuvwxyz0123456789")
    pieces = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *WORDS, *letters, *(f"##{letter}" for letter in letters)]
    pieces += ["yes", "no"]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 1), ("[SEP]", 2)])
    tokenizer.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", bos_token="[CLS]", eos_token="[SEP]", unk_token="[UNK]"
    )


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """Return a GPT-2-like tokenizer, whose words carry the space before them; it has no BOS."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "w"), ("Ġw", "h"), ("Ġwh", "y"), ("w", "h"), ("wh", "y"), ("t", "h"), ("th", "e"), ("Ġ", "s")]
    pieces = ["<pad>", "<eos>", *alphabet, *("".join(pair) for pair in merges)]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """Return a Llama-like tokenizer, which puts ▁ before every text itself; it has BOS and EOS."""
    letters = list("abcdefghijklmnopqrstuvwxyz0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ.,:?!-'\n")
    merges = [("▁", "w"), ("▁w", "h"), ("▁wh", "y"), ("▁", "t"), ("▁t", "h"), ("▁th", "e")]
    pieces = ["<unk>", "<s>", "</s>", "▁", *letters, *("".join(pair) for pair in merges)]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always", split=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    )


TOKENIZERS = {"wordpiece": wordpiece_tokenizer, "bytes": byte_level_tokenizer, "metaspace": metaspace_tokenizer}
