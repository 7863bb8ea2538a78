"""On an accelerator, where there is one: what the CPU computes."""

import pytest
import torch

from qpeft.loading import load_lm
from qpeft.model_config import ModelConfig
from tiny_adapters import build, with_store
from tiny_training import step

DEVICE = "cuda"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("store", [False, True])
@pytest.mark.parametrize("name", ["qpeft_a", "qpeft_r", "qpeft_c", "soft_prompt", "passage_prompt", "lora"])
def test_a_training_step_is_that_of_the_cpu(name, store, saved_model):
    made = build(name, load_lm(ModelConfig(str(saved_model), dtype="float32", device="cpu")), trained=True)
    numbers, found = made.state_dict(), []
    for device in ("cpu", DEVICE):
        lm = load_lm(ModelConfig(str(saved_model), dtype="float32", device=device))
        lm = with_store(lm) if store else lm
        adapter = build(name, lm)
        adapter.load_state_dict(numbers)
        found.append(step(lm, adapter))
    for on_cpu, there in zip(*found, strict=True):
        assert on_cpu.abs().max() > 1e-4
        torch.testing.assert_close(there, on_cpu, atol=1e-4, rtol=1e-3)
