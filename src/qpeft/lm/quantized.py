"""Weights of 8 or 4 bits: how models are opened with them, by bitsandbytes."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from qpeft.errors import MissingDependencyError


def quantized_options(quantization: str, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Return what `from_pretrained` is told for a value of `--quantization`; nothing for `none`.

    4 bits are QLoRA's (2305.14314): NF4, made for normally distributed weights, with double quantisation, multiplied
    in `dtype`. 8 bits are LLM.int8() (2208.07339), which multiplies what exceeds 8 bits in float16, whatever `dtype`.

    Raises:
        MissingDependencyError: quantisation without bitsandbytes.
    """
    if quantization == "none":
        return {}
    for module in ("autograd._functions", "backends.cpu.ops"):
        logging.getLogger(f"bitsandbytes.{module}").addFilter(_worth_saying)
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError("bitsandbytes", "quantized") from error
    settings: Any = BitsAndBytesConfig(
        load_in_8bit=quantization == "8bit",
        load_in_4bit=quantization == "4bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )  # type: ignore[no-untyped-call]
    return {"quantization_config": settings, "device_map": {"": device}}


def _worth_saying(record: logging.LogRecord) -> bool:
    """Tell whether a message is one of others than these.

    Every product in 8 bits says that its input is cast, a line per layer and batch; and importing asks for a package of
    kernels for the weights that `keep_gradients` does not let it pack.
    """
    said = record.getMessage()
    return "inputs will be cast" not in said and "gemm_4bit_forward" not in said


def keep_gradients(model: nn.Module) -> None:
    """Keep bitsandbytes from packing weights of 4 bits for AVX-512: products with packed ones have no gradient.

    It packs them when they are first used without one, as for passages and the dev list; training would go on with
    what that leaves, and no error.
    """
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
