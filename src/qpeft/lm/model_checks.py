"""What is tried with a model when it is opened: our attention, that it reads forwards only, how it counts positions."""

from __future__ import annotations

from typing import Any

import torch

from qpeft.errors import ModelError, OptionError
from qpeft.lm import cpu_attention
from qpeft.lm.agreement import agree


def choose_attention(model: Any, name: str, device: torch.device) -> None:
    """Set how attention is computed.

    Raises:
        OptionError: the model has no such attention; or flex_attention on a CPU, for which PyTorch 2.13 compiles what
            ends in a segmentation fault.
    """
    if name == "flex_attention" and device.type == "cpu":
        raise OptionError(f"--attention-kernel {name} is for GPUs; on CPUs take auto, sdpa or eager")
    if name == "auto" and device.type != "cpu":
        return
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation(cpu_attention.NAME if name == "auto" else name)
        _two_rows(model)
    except (ValueError, ImportError, RuntimeError, AttributeError) as error:  # the third: of kernels and compilers
        if name != "auto":
            raise OptionError(f"--attention-kernel {name}: {str(error).splitlines()[0]}") from error
        model.set_attn_implementation(before)  # it needs more than ours can do


def check_causal(model: Any, name: str) -> None:
    """Refuse a model that reads in both directions, such as plain BERT: it would see the query that it should guess."""
    first, second = _two_rows(model)
    if not torch.allclose(first, second, rtol=1e-2, atol=1e-2):
        raise ModelError(f"model {name!r} reads in both directions, so it gives no likelihoods")


@torch.inference_mode()
def check_positions(model: Any, name: str) -> None:
    """Refuse a model that numbers its positions otherwise than from 0, such as RoBERTa: they are given it here."""
    ids = torch.tensor([[3, 4, 5, 6]], device=model.device)
    numbered = _outputs(model, ids, position_ids=torch.arange(4, device=model.device)[None])
    if not agree(_outputs(model, ids), numbered, model):
        raise ModelError(f"model {name!r} does not number its positions from 0, and is not supported")


@torch.inference_mode()
def _two_rows(model: Any) -> torch.Tensor:
    """Return what stands at the first position of two rows that differ in the second.

    Logits `[2, V]`, or of a classifier the last states `[2, d]`.
    """
    return _outputs(model, torch.tensor([[1, 2], [1, 3]], device=model.device))[:, 0].float()


def _outputs(model: Any, ids: torch.Tensor, **more: Any) -> torch.Tensor:
    """Return logits `[B, T, V]`, or of a classifier the last states `[B, T, d]`."""
    if classifies(model.config):
        states: torch.Tensor = model.base_model(input_ids=ids, use_cache=False, **more).last_hidden_state
        return states
    logits: torch.Tensor = model(input_ids=ids, use_cache=False, **more).logits
    return logits


def classifies(settings: Any) -> bool:
    """Return whether a model of this configuration was saved as a classifier."""
    return any(name.endswith("ForSequenceClassification") for name in settings.architectures or ())
