"""The defaults keep an adapter small beside its model."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from qpeft import adapters
from qpeft.lm.causal import CausalLM
from qpeft.loading import load_lm
from qpeft.model_config import ModelConfig
from tiny_adapters import NAMES
from tiny_models import wordpiece_tokenizer

HALF_A_BILLION = {
    "vocab_size": 151_936,
    "hidden_size": 896,
    "intermediate_size": 4_864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
"""The shape of Qwen2.5-0.5B."""


def trained(name, lm):
    """Return how many parameters an adapter has by default."""
    module = adapters.load(name)
    return module.build(module.Config(), lm).count_parameters()


@pytest.fixture(scope="module")
def tiny_lm():
    return load_lm(ModelConfig(dtype="float32"))


@pytest.fixture(scope="module")
def half_a_billion():
    """How many parameters such a model has, and one of its width with few words and one layer.

    What adapters train depends on the width alone.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2", **HALF_A_BILLION))
    count = sum(parameter.numel() for parameter in model.parameters())
    small = {"vocab_size": 1_000, "num_hidden_layers": 1}
    narrow = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2", **(HALF_A_BILLION | small)))
    return count, CausalLM(narrow, wordpiece_tokenizer(), name="narrow", max_length=128, batch_tokens=4096)


@pytest.mark.parametrize("name", NAMES)
def test_at_most_a_hundredth_of_the_embedded_model(name, tiny_lm):
    count = sum(parameter.numel() for parameter in tiny_lm.model.parameters())
    assert 22e6 < count < 23e6
    assert 0 < trained(name, tiny_lm) <= count / 100


@pytest.mark.parametrize("name", NAMES)
def test_at_most_a_hundredth_of_half_a_billion(name, half_a_billion):
    count, narrow = half_a_billion
    assert 480e6 < count < 510e6
    assert 0 < trained(name, narrow) <= count / 100
