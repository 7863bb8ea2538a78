"""Weights of 8 and 4 bits on the CPU; plain layers of the same weights are the reference."""

import sys

import bitsandbytes
import pytest
import torch
from test_causal import rows_for
from torch import nn

from qpeft.errors import MissingDependencyError
from qpeft.loading import load_lm
from qpeft.model_config import ModelConfig
from tiny_adapters import build, with_store
from tiny_training import step


def test_quantisation_needs_bitsandbytes(saved_model, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingDependencyError, match=r"qpeft\[quantized\]"):
        load_lm(ModelConfig(str(saved_model), quantization="4bit"))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_4_bits_are_multiplied_in_the_number_type_asked_for(dtype):
    lm = load_lm(ModelConfig(quantization="4bit", dtype=dtype, device="cpu"))
    kinds = {module.compute_dtype for module in lm.model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)}
    assert kinds == {getattr(torch, dtype)}


def test_8_bits_are_no_reason_to_compute_everything_anew():
    lm = load_lm(ModelConfig(quantization="8bit", dtype="float16", device="cpu", passage_cache=0.1))
    assert lm.goes_on
    assert lm.spares_last_layer
    scores = [value.target.mean() for value in lm.log_probs(rows_for(lm))]
    lm.store = None
    torch.testing.assert_close([value.target.mean() for value in lm.log_probs(rows_for(lm))], scores, atol=0.2, rtol=0)


def test_what_bitsandbytes_says_of_every_product_is_not_passed_on(caplog):
    lm = load_lm(ModelConfig(quantization="8bit", dtype="float32", device="cpu"))
    lm.log_probs(rows_for(lm)[:1])
    assert not [record for record in caplog.records if record.name.startswith("bitsandbytes")]


def in_full(layer):
    """Return a plain layer with the weights that a quantised one stands for."""
    if isinstance(layer, bitsandbytes.nn.Linear4bit):
        weight = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    else:
        weight = layer.weight.float() * layer.state.SCB[:, None] / 127
    plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    plain.weight.data = weight.float()
    if layer.bias is not None:
        plain.bias.data = layer.bias.data.float()
    return plain


@pytest.mark.parametrize("name", ["qpeft_a", "lora"])
@pytest.mark.parametrize(("quantization", "tolerance"), [("4bit", 1e-4), ("8bit", 0.05)])
def test_gradients_are_those_of_the_weights_in_full(name, quantization, tolerance, wide_model):
    """In 8 bits inputs are rounded as well, so that numbers are near alone."""
    lm = with_store(load_lm(ModelConfig(str(wide_model), quantization=quantization, dtype="float32", device="cpu")))
    adapter = build(name, lm, trained=True)
    step(lm, adapter)  # encodes the passages
    _, scores, gradient = step(lm, adapter)
    adapter.withdraw()
    for path, layer in [*lm.model.named_modules()]:
        if isinstance(layer, (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)):
            lm.model.set_submodule(path, in_full(layer))
    lm.store.clear()
    _, full_scores, full = step(lm, build(name, lm, trained=True))
    assert (scores - full_scores).norm() < tolerance * full_scores.norm()
    assert full.norm() > 1e-3
    assert (gradient - full).norm() < tolerance * full.norm()
