"""Compiled norms, MLPs and rotations: scores as without, gradients to the bit, clear errors where it cannot be done."""

import os
import re
import subprocess
import sys
from functools import partial

import pytest
import torch
from test_causal import assert_close, rows_for

from qpeft.errors import OptionError
from qpeft.lm.compiled import Compiled
from qpeft.loading import load_lm
from qpeft.model_config import ModelConfig
from reference import naive_log_probs
from tiny_adapters import build as build_adapter
from tiny_adapters import with_store
from tiny_models import FAMILIES, build_family, can_compile

needs_compiler = pytest.mark.skipif(not can_compile(), reason="no C++ compiler")
EXPECTED = {  # compiled modules of a layer
    "llama": ["RMSNorm"] * 2 + ["MLP", "Attention"],
    "mistral": ["RMSNorm"] * 2 + ["MLP", "Attention"],
    "qwen3": ["RMSNorm"] * 4 + ["MLP", "Attention"],
    "gemma2": ["RMSNorm"] * 4 + ["MLP", "Attention"],
    "gpt2": ["MLP"],
    "gpt_neox": ["MLP", "Attention"],
    "mixtral": ["RMSNorm"] * 2 + ["Attention"],
    "bert": ["Intermediate"],
}


def changed(model):
    """Return the modules of the first layer that have another forward."""
    return [module for name, module in model.named_modules() if "forward" in vars(module) and ".0" in name]


@pytest.mark.parametrize("name", FAMILIES)
def test_norms_mlps_and_rotations_are_compiled_and_experts_are_not(name, monkeypatch):
    monkeypatch.setattr("qpeft.lm.compiled._try", lambda model: None)
    model = build_family(name)
    Compiled(model)
    kinds = [next(kind for kind in set(EXPECTED[name]) if kind in type(part).__name__) for part in changed(model)]
    assert sorted(kinds) == sorted(EXPECTED[name])


def test_the_rotation_is_another_one_in_this_model_alone(monkeypatch):
    """And attention whose forward something else wraps is left alone."""
    calls = []

    def counting(function):
        def counted(*args, **kwargs):
            calls.append(function.__name__)
            return function(*args, **kwargs)

        return counted

    monkeypatch.setattr("qpeft.lm.compiled._compile", counting)
    model, other = build_family("llama"), build_family("llama")
    wrapped = model.model.layers[0].self_attn
    wrapped.forward = partial(wrapped.forward)
    compiled = Compiled(model)
    calls.clear()
    tokens = torch.arange(5)[None]
    with torch.no_grad():
        found = model(tokens).logits
        assert calls.count("apply_rotary_pos_emb") == len(model.model.layers) - 1
        calls.clear()
        assert torch.equal(other(tokens).logits, found)
        with compiled.off():
            assert torch.equal(model(tokens).logits, found)
    assert not calls


@needs_compiler
@pytest.mark.parametrize("name", ["qwen3", "gpt2", "gpt_neox"])
def test_scores_are_those_of_the_model_in_any_company(name, make_lm):
    lm = make_lm(name)
    rows = rows_for(lm)
    expected = [naive_log_probs(lm.model, row) for row in rows]
    lm.compiled = Compiled(lm.model)
    assert_close(lm.log_probs(rows), expected)
    assert_close([lm.log_probs([row])[0] for row in rows], expected)
    one, other = with_store(lm), with_store(lm)
    assert_close(one.log_probs(rows), expected)
    for row in reversed(rows):
        context = row.context[: row.hint]
        assert torch.equal(other.encode(context).cache, one.encode(context).cache), "bits always the same"


@needs_compiler
def test_gradients_and_layers_that_lora_changes_are_computed_as_without(make_lm):
    plain, lm = make_lm("llama"), make_lm("llama")
    lm.compiled = Compiled(lm.model)
    rows = rows_for(lm)
    soft = [build_adapter("soft_prompt", each, trained=True) for each in (plain, lm)]
    for one, adapter in zip((plain, lm), soft, strict=True):
        one.score(rows, [adapter] * len(rows))[0].sum().backward()
    for a, b in zip(soft[0].parameters(), soft[1].parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
        assert a.grad.abs().sum() > 0
    lora = [build_adapter("lora", each, trained=True) for each in (plain, lm)]
    values = [one.log_probs(rows, adapters=adapter) for one, adapter in zip((plain, lm), lora, strict=True)]
    assert all(torch.equal(a.target, b.target) for a, b in zip(*values, strict=True))


@needs_compiler
def test_the_option_compiles_what_is_opened(saved_model):
    opened = {choice: load_lm(ModelConfig(str(saved_model), compile=choice)) for choice in ("auto", "yes")}
    assert [lm.compiled is not None for lm in opened.values()] == [False, True]
    assert opened["yes"].describe()["compiled"]


def test_a_missing_compiler_is_an_error_of_the_command(tmp_path, saved_model):
    """In a process of its own: torch remembers which compiler it found."""
    command = [sys.executable, "-m", "qpeft", "score", "--model", str(saved_model), "--compile", "yes"]
    command += ["--query", "why", "--passage", "the sky"]
    environment = {**os.environ, "CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert re.search(r"--compile yes: \w+: \S", done.stderr)
    assert "Traceback" not in done.stderr


def test_a_model_without_such_parts_is_an_error():
    bare = build_family("gpt2")
    for layer in bare.transformer.h:
        layer.feed_backward = layer._modules.pop("mlp")
    with pytest.raises(OptionError, match="nothing to compile"):
        Compiled(bare)
