"""Fixtures around the tiny models."""

from __future__ import annotations

import os

import pytest
import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from qpeft.lm.causal import CausalLM
from qpeft.lm.encoder_decoder import EncoderDecoderLM
from tiny_models import FAMILIES, TOKENIZERS, VOCABULARY, build_family, wordpiece_tokenizer

os.environ["HAYSTACK_TELEMETRY_ENABLED"] = "False"  # read on import


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Keep what was measured on this machine out of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QPEFT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", params=sorted(FAMILIES))
def family(request):
    """Name of a model family."""
    return request.param


@pytest.fixture
def no_rounding(monkeypatch):
    """Let batches have as many rows as fit, and be as wide as their longest."""
    for number in ("causal.MULTIPLE", "encoding.MULTIPLE", "last_layer.MULTIPLE", "pretrained.ALIKE"):
        monkeypatch.setattr(f"qpeft.lm.{number}", 1)
    monkeypatch.setattr("qpeft.lm.layout.EIGHTHS", 2**60)


@pytest.fixture
def one_thread():
    """Let torch compute in the calling thread alone."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def make_lm():
    """Return a function that wraps a fresh tiny model of a family, float32 unless told otherwise."""

    def make(family, *, batch_tokens=4096, padding_side="left", dtype=torch.float32, max_length=128):
        return CausalLM(
            build_family(family).to(dtype),
            wordpiece_tokenizer(),
            name=f"tiny-{family}",
            max_length=max_length,
            batch_tokens=batch_tokens,
            padding_side=padding_side,
        )

    return make


@pytest.fixture(scope="session")
def t5():
    """Return a tiny T5 as an `EncoderDecoderLM`."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "t5",
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=2,
    )
    model = AutoModelForSeq2SeqLM.from_config(config)
    return EncoderDecoderLM(model, wordpiece_tokenizer(), name="tiny-t5", max_length=128, batch_tokens=4096)


def saved_llama(folder, **options):
    """Write a tiny Llama with a WordPiece tokenizer, and return its folder."""
    build_family("llama", **options).save_pretrained(folder)
    wordpiece_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def saved_model(tmp_path_factory):
    """Return the folder of a tiny Llama with a WordPiece tokenizer."""
    return saved_llama(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="session")
def wide_model(tmp_path_factory):
    """Return the folder of a tiny Llama whose layers are as wide as bitsandbytes' blocks of weights."""
    return saved_llama(tmp_path_factory.mktemp("wide-llama"), hidden_size=64, intermediate_size=64)


@pytest.fixture(scope="session")
def tokenizers():
    """One tokenizer of each kind."""
    return {name: make() for name, make in TOKENIZERS.items()}


@pytest.fixture(scope="session", params=sorted(TOKENIZERS))
def tokenizer(request, tokenizers):
    """A tokenizer of each kind in turn."""
    return tokenizers[request.param]
