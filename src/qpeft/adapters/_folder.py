"""Adapter folders: PEFT's two files, a model card, and what made them.

    adapter_config.json          peft_type QPEFT, options of the adapter, template, identity of the base model
    adapter_model.safetensors    trained tensors, named base_model.qpeft.…
    README.md                    model card
    provenance.json              versions, data, seed, training history

A folder is written under another name and moved into place, so that it is whole or absent. On loading, everything that
must agree with the base model is compared by name.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from qpeft import adapters
from qpeft.adapters._base import PromptAdapter
from qpeft.adapters._card import card
from qpeft.errors import AdapterError, nearest
from qpeft.lm import CausalLM
from qpeft.provenance import file_fingerprint
from qpeft.template import Template

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.qpeft."


@dataclass(frozen=True)
class AdapterFolder:
    """An opened adapter, and what goes with it."""

    name: str
    adapter: PromptAdapter
    template: Template
    max_passage_tokens: int | None
    sha256: str


def save_adapter(
    folder: Path,
    name: str,
    adapter: PromptAdapter,
    lm: CausalLM,
    template: Template,
    *,
    max_passage_tokens: int | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Write an adapter folder; an existing one is replaced only once the new one is whole.

    Raises:
        AdapterError: it cannot be written; what stood there before is untouched.
    """
    config: Any = adapter.config
    described = {
        "peft_type": "QPEFT",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "base_model_name_or_path": lm.name,
        "revision": lm.revision,
        "adapter": name,
        "options": dataclasses.asdict(config),
        "template": dataclasses.asdict(template),
        "max_passage_tokens": max_passage_tokens,
        "trained_parameters": adapter.count_parameters(),
        "base": base_identity(lm),
    }
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        (temporary / CONFIG).write_text(json.dumps(described, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        tensors = {_PREFIX + key: value.detach().cpu().contiguous() for key, value in adapter.state_dict().items()}
        save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
        (temporary / "README.md").write_text(card(described, provenance or {}), encoding="utf-8")
        text = json.dumps(dict(provenance or {}), indent=2, ensure_ascii=False)
        (temporary / "provenance.json").write_text(text + "\n", encoding="utf-8")
        _replace(temporary, folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise AdapterError(f"adapter {str(folder)!r} cannot be written: {error}") from error


def load_adapter(folder: str | Path, lm: CausalLM) -> AdapterFolder:
    """Open an adapter for a model.

    Raises:
        AdapterError: no adapter folder, damaged, or made for another model; says what differs.
    """
    folder = Path(folder)
    described = read_config(folder)
    _check_base(folder, described["base"], lm)
    module = adapters.load(described["adapter"])
    known = {field.name for field in dataclasses.fields(module.Config)}
    unknown = sorted(set(described["options"]) - known)
    if unknown:
        raise AdapterError(f"adapter {str(folder)!r} has the option {unknown[0]!r}{nearest(unknown[0], known)}")
    adapter: PromptAdapter = module.build(module.Config(**described["options"]), lm)
    try:
        tensors = load_file(folder / WEIGHTS, device=str(lm.device))
        adapter.load_state_dict({key.removeprefix(_PREFIX): value for key, value in tensors.items()})
    except (OSError, SafetensorError, RuntimeError) as error:
        first = " ".join(str(error).split())[:200]
        raise AdapterError(f"adapter {str(folder)!r}: {WEIGHTS} cannot be read: {first}") from error
    adapter.eval().requires_grad_(False)
    return AdapterFolder(
        described["adapter"],
        adapter,
        Template(**described["template"]),
        described["max_passage_tokens"],
        file_fingerprint(folder / WEIGHTS),
    )


def read_config(folder: Path) -> dict[str, Any]:
    """Return what `adapter_config.json` says, without opening a model.

    Raises:
        AdapterError: there is none, or it is not one of qpeft's.
    """
    path = folder / CONFIG
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise AdapterError(f"no adapter in {str(folder)!r}: {CONFIG} is missing") from error
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path}: not readable as JSON ({error})") from error
    wanted = {"adapter", "options", "template", "base", "max_passage_tokens"}
    if not isinstance(described, dict) or described.get("peft_type") != "QPEFT" or not wanted <= set(described):
        kind = described.get("peft_type") if isinstance(described, dict) else None
        raise AdapterError(f"{path}: not an adapter of qpeft (peft_type {kind!r})")
    return described


def base_identity(lm: CausalLM) -> dict[str, Any]:
    """Return what must agree between the model that an adapter was trained for and the one that it is used with."""
    rows, width = lm.embeddings.weight.shape
    return {
        "name": lm.name,
        "revision": lm.revision,
        "sha256": lm.sha256,
        "hidden_size": width,
        "vocab_size": rows,
        "tokenizer": tokenizer_fingerprint(lm.tokenizer),
    }


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Return the SHA-256 of a tokenizer's vocabulary and special tokens."""
    facts = [sorted(tokenizer.get_vocab().items()), sorted(map(str, tokenizer.special_tokens_map.items()))]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _check_base(folder: Path, base: Mapping[str, Any], lm: CausalLM) -> None:
    found = base_identity(lm)
    names = {"hidden_size": "hidden size", "vocab_size": "vocabulary size", "tokenizer": "tokenizer"}
    for key, words in names.items():
        if base.get(key) != found[key]:
            raise AdapterError(
                f"adapter {str(folder)!r} was trained for {base.get('name')!r}: its {words} {base.get(key)!s:.12} "
                f"is not that of {lm.name!r}, {found[key]!s:.12}"
            )
    for key, words in (("sha256", "weights"), ("revision", "revision")):
        if base.get(key) and found[key] and base[key] != found[key]:
            raise AdapterError(
                f"adapter {str(folder)!r} was trained for {base.get('name')!r} with {words} {base[key]:.12}; "
                f"{lm.name!r} has {words} {found[key]:.12}"
            )
    if not (base.get("sha256") and found["sha256"]) and base.get("name") != found["name"]:
        raise AdapterError(f"adapter {str(folder)!r} was trained for {base.get('name')!r}, not for {lm.name!r}")


def _replace(temporary: Path, folder: Path) -> None:
    """Move a finished folder into place, over an older one if there is one."""
    if folder.exists():
        old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
        os.replace(folder, old)
        os.replace(temporary, folder)
        shutil.rmtree(old, ignore_errors=True)
    else:
        folder.parent.mkdir(parents=True, exist_ok=True)
        os.replace(temporary, folder)
