"""PEFT folders that others made: LoRA with a head on the last token, as RankLLaMA is published.

They name the base model, and nothing of the template; RankLLaMA's is taken unless another is asked for. The head stands
under one of several names, which versions of PEFT gave it.

Source: Ma et al. 2023, arXiv 2310.08319; https://github.com/texttron/tevatron
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from qpeft.adapter import Adapter, withdrawn_on_failure
from qpeft.adapters import lora
from qpeft.adapters._lora import HEAD, LoraAdapter
from qpeft.errors import AdapterError, MissingDependencyError, OptionError
from qpeft.lm.causal import CausalLM

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
TEMPLATE = "rankllama"
CHANGING_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""What PEFT's starts of LoRA begin with that subtract themselves from the base model's weights."""
_HEAD = re.compile(rf"model\.{HEAD}(\.modules_to_save)?(\.\w+)?\.weight")


def is_published(described: Any) -> bool:
    """Return whether PEFT's configuration is that of LoRA for a classifier."""
    return isinstance(described, dict) and (described.get("peft_type"), described.get("task_type")) == (
        "LORA",
        "SEQ_CLS",
    )


def open_published(folder: Path, described: Mapping[str, Any], lm: CausalLM) -> tuple[Adapter, Path]:
    """Return the adapter, and the file that it came from.

    Raises:
        AdapterError: made for another model, damaged, or of a kind that is not understood.
        MissingDependencyError: peft is not installed.
    """
    base = str(described.get("base_model_name_or_path"))
    if not (name := PurePosixPath(base).name) or name not in lm.name:
        raise AdapterError(
            f"adapter {str(folder)!r} was trained for {base!r}, not for {lm.name!r}; "
            f"the name of a copy must hold {name!r}"
        )
    path = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if path is None:
        raise AdapterError(f"adapter {str(folder)!r} has no weights: {' or '.join(WEIGHTS)}")
    tensors = _named(_read(path, lm), folder)
    adapter = _build(folder, lm)
    try:
        with withdrawn_on_failure(adapter):
            adapter.add_head(lm)
            adapter.load_state_dict(tensors)
    except RuntimeError as error:
        raise AdapterError(f"adapter {str(folder)!r}: {path.name}: {' '.join(str(error).split())[:300]}") from error
    return adapter, path


def _read(path: Path, lm: CausalLM) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path, device=str(lm.device))
        tensors: dict[str, Tensor] = torch.load(path, map_location=lm.device, weights_only=True)
        return tensors
    except (OSError, SafetensorError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise AdapterError(f"{path}: cannot be read: {' '.join(str(error).split())[:200]}") from error


def _named(tensors: Mapping[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """Return the tensors under the names that they have here; of several heads, the one that was trained."""
    found: dict[str, Tensor] = {}
    heads: dict[str, Tensor] = {}
    for key, value in tensors.items():
        name = re.sub(r"\.(lora_[AB])\.\w+\.weight$", r".\1.weight", key.removeprefix("base_model."))
        (heads if _HEAD.fullmatch(name) else found)[name] = value
    trained = {name: value for name, value in heads.items() if "original_module" not in name}
    if len(trained) != 1:
        raise AdapterError(
            f"adapter {str(folder)!r} has {len(trained) or 'no'} trained heads on the last token, not one"
        )
    return {**found, f"model.{HEAD}.weight": next(iter(trained.values()))}


def _refuse_changed_base(start: Any) -> None:
    """Raise OptionError for a start that takes itself out of the base model's weights, for whoever uses them next."""
    if isinstance(start, str) and start.startswith(CHANGING_BASE):
        raise OptionError(
            f"init_lora_weights is {start!r}, which changes the base model; save the adapter as ordinary LoRA, with "
            "PEFT's path_initial_model_for_weight_conversion"
        )


def _build(folder: Path, lm: CausalLM) -> Adapter:
    try:
        from peft import LoraConfig, PeftConfig
    except ImportError as error:
        raise MissingDependencyError("peft", "lora") from error
    try:
        settings = PeftConfig.from_pretrained(str(folder))
        assert isinstance(settings, LoraConfig)
        _refuse_changed_base(settings.init_lora_weights)
        settings.inference_mode, settings.modules_to_save = False, None
        modules = settings.target_modules
        config = lora.Config(
            r=settings.r,
            alpha=settings.lora_alpha,
            modules=modules if isinstance(modules, str) else ",".join(sorted(modules or ())),
        )
        return LoraAdapter(config, lm, settings)
    except (OptionError, TypeError, ValueError) as error:
        raise AdapterError(f"adapter {str(folder)!r}: adapter_config.json cannot be used: {error}") from error
