"""Adapter folders: PEFT's two files, a model card, and what made them.

    adapter_config.json          peft_type QPEFT, options of the adapter, template, identity of the base model
    adapter_model.safetensors    trained tensors, named base_model.qpeft.…
    README.md                    model card
    provenance.json              versions, data, seed, training history
    calibration.json             from scores to probabilities, where `qpeft calibrate` put it there

LoRA has the files that PEFT itself opens, and qpeft's facts, for which PEFT's configuration has no room, beside them:

    adapter_config.json          peft_type LORA, as PEFT writes it
    adapter_model.safetensors    base_model.model.…, and base_model.qpeft.… of a prompt adapter that goes with it
    qpeft.json                   what stands in adapter_config.json of the others

A folder is written under another name and moved into place, so that it is whole or absent. On loading, everything that
must agree with the base model is compared by name.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from qpeft import adapters
from qpeft.adapter import Adapter, withdrawn_on_failure
from qpeft.adapters._card import card
from qpeft.adapters._published import TEMPLATE as PUBLISHED_TEMPLATE
from qpeft.adapters._published import is_published, open_published
from qpeft.atomic import replacing_folder
from qpeft.data.records import write_json
from qpeft.errors import AdapterError, InputError, OptionError, nearest
from qpeft.evaluation.calibration_file import FILE as CALIBRATION
from qpeft.evaluation.calibration_file import Calibration, ScoreOrigin, read_calibration
from qpeft.lm.causal import CausalLM
from qpeft.lm.pretrained import PretrainedLM
from qpeft.provenance import file_fingerprint
from qpeft.template import Template, load_template

CONFIG, WEIGHTS, FACTS = "adapter_config.json", "adapter_model.safetensors", "qpeft.json"
FILES = (CONFIG, WEIGHTS, FACTS, CALIBRATION, "README.md", "provenance.json", "training.png")
"""All that an adapter folder may hold."""
PARTS = {"adapter": str, "options": dict, "template": dict, "base": dict, "max_passage_tokens": int | None} | {
    "method": str, "method_options": dict,
}  # fmt: skip
"""What must stand in a configuration, unless it is `OPTIONAL`, and as what."""
OPTIONAL = {"method", "method_options"}


@dataclass(frozen=True)
class AdapterFolder:
    """An opened adapter, and what goes with it; `calibration` where it has been calibrated.

    `method` is what it was trained for, and `method_options` are those options of it that belong to the adapter.
    `names_template` is false where the folder does not tell what template it was trained with.
    """

    name: str
    adapter: Adapter
    template: Template
    max_passage_tokens: int | None
    sha256: str
    calibration: Calibration | None = None
    method: str = "query_likelihood"
    method_options: Mapping[str, Any] = field(default_factory=dict)
    names_template: bool = True


def save_adapter(
    folder: Path,
    name: str,
    adapter: Adapter,
    lm: CausalLM,
    template: Template,
    *,
    max_passage_tokens: int | None = None,
    provenance: Mapping[str, Any] | None = None,
    method: str = "query_likelihood",
    method_options: Mapping[str, Any] | None = None,
) -> None:
    """Write an adapter folder; an existing one is replaced only once the new one is whole.

    Raises:
        AdapterError: it cannot be written; what stood there before is untouched.
    """
    config: Any = adapter.config
    peft_facts = adapter.peft_facts()
    described = {
        "peft_type": "LORA" if peft_facts else "QPEFT",
        "task_type": "CAUSAL_LM" if adapter.head is None else "SEQ_CLS",
        "inference_mode": True,
        "base_model_name_or_path": lm.name,
        "revision": lm.revision,
        "adapter": name,
        "method": method,
        "method_options": dict(method_options or {}),
        "head": adapter.head is not None,
        "options": dataclasses.asdict(config),
        "template": dataclasses.asdict(template),
        "max_passage_tokens": max_passage_tokens,
        "trained_parameters": adapter.count_parameters(),
        "base": base_identity(lm),
    }
    try:
        with replacing_folder(folder) as temporary:
            write_json(temporary / (FACTS if peft_facts else CONFIG), described)
            if peft_facts:
                write_json(temporary / CONFIG, peft_facts)
            prefix = _prefix(adapter)
            tensors = {prefix + key: value.detach().cpu().contiguous() for key, value in adapter.state_dict().items()}
            save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
            shutil.copymode(temporary / CONFIG, temporary / WEIGHTS)  # safetensors lets only the owner read
            (temporary / "README.md").write_text(card(described, provenance or {}), encoding="utf-8")
            write_json(temporary / "provenance.json", provenance or {})
    except (InputError, OSError, SafetensorError) as error:
        raise AdapterError(f"adapter {str(folder)!r} cannot be written: {error}") from error


def embedded_adapters() -> list[str]:
    """Return the names of the adapters that ship with qpeft, for the embedded model."""
    root = Path(str(resources.files("qpeft"))) / "models"
    return sorted(path.parent.name for path in root.glob(f"*/{CONFIG}"))


def adapter_path(name: str | Path) -> Path:
    """Return the folder of an embedded adapter, or the path as it is; a folder of one's own is meant by `./NAME`."""
    if str(name) in embedded_adapters():
        return Path(str(resources.files("qpeft"))) / "models" / str(name)
    return Path(name)


def load_adapter(folder: str | Path, lm: CausalLM) -> AdapterFolder:
    """Open an adapter for a model: a folder, or the name of an embedded one.

    Raises:
        AdapterError: no adapter folder, damaged, or made for another model; says what differs.
    """
    folder = _existing(folder)
    if foreign := _published(folder):
        adapter, path = open_published(folder, foreign, lm)
        adapter.eval().requires_grad_(False)
        template = load_template(PUBLISHED_TEMPLATE)
        return AdapterFolder(
            "lora", adapter, template, None, file_fingerprint(path), method="classifier", names_template=False
        )
    described = read_config(folder)
    _check_base(folder, described["base"], lm)
    adapter, template = _build(folder, described, lm)
    with withdrawn_on_failure(adapter):
        _fill(folder, adapter, lm)
        sha256 = file_fingerprint(folder / WEIGHTS)
        calibration = _calibration(folder, described["adapter"], sha256, template, lm)
    return AdapterFolder(
        described["adapter"],
        adapter,
        template,
        described["max_passage_tokens"],
        sha256,
        calibration,
        described["method"],
        described.get("method_options", {}),
    )


def method_of(folder: str | Path) -> str:
    """Return what an adapter was trained for, without opening a model.

    Raises:
        AdapterError: no adapter folder, or damaged.
    """
    folder = _existing(folder)
    return "classifier" if _published(folder) else str(read_config(folder)["method"])


def _existing(name: str | Path) -> Path:
    folder = adapter_path(name)
    if not folder.exists():
        raise AdapterError(f"no adapter {str(folder)!r}{nearest(str(folder), embedded_adapters())}")
    return folder


def _published(folder: Path) -> Any:
    """Return PEFT's configuration of a folder that others made, or None."""
    described = None if (folder / FACTS).is_file() else _read_json(folder / CONFIG)
    return described if is_published(described) else None


def open_adapter(
    adapter: AdapterFolder | str | Path,
    lm: PretrainedLM,
    template: Template | None,
    option: str | None = None,
    *,
    method: str | None = None,
) -> AdapterFolder:
    """Open an adapter, unless it is open already, and make sure that it can be used with a model and a template.

    Args:
        adapter: its folder, the name of an embedded one, or an opened one.
        lm: the language model.
        template: what was asked for, if anything.
        option: how it was asked for; by default the template's name.
        method: what it is to be used for; None: whatever it was trained for.

    Raises:
        OptionError: the model has an encoder, or the adapter was trained with another template or for another method.
        AdapterError: as `load_adapter`.
    """
    if not isinstance(lm, CausalLM):
        raise OptionError(f"--adapter needs a decoder-only model, not {type(lm).__name__}")
    if isinstance(adapter, AdapterFolder):
        return _agreeing(adapter, "the adapter", template, option, method)
    opened = load_adapter(adapter, lm)
    with withdrawn_on_failure(opened.adapter):
        return _agreeing(opened, f"adapter {str(adapter)!r}", template, option, method)


def _agreeing(
    opened: AdapterFolder, named: str, template: Template | None, option: str | None, method: str | None
) -> AdapterFolder:
    if method not in (None, opened.method):
        raise OptionError(f"--method {method}: {named} was trained for --method {opened.method}")
    if template is not None and not opened.names_template:
        return dataclasses.replace(opened, template=template)
    if template is not None and template.fingerprint != opened.template.fingerprint:
        raise OptionError(f"--template {option or template.name}: {named} was trained with {opened.template.name!r}")
    return opened


def _build(folder: Path, described: Mapping[str, Any], lm: CausalLM) -> tuple[Adapter, Template]:
    """Return the untrained adapter and the template that a configuration describes."""
    try:
        config = adapters.load(described["adapter"]).Config
        known = {field.name for field in dataclasses.fields(config)}
        unknown = sorted(set(described["options"]) - known)
        if unknown:
            raise AdapterError(f"adapter {str(folder)!r} has the option {unknown[0]!r}{nearest(unknown[0], known)}")
        template = Template(**described["template"])
        adapter: Adapter = adapters.build(described["adapter"], config(**described["options"]), lm)
        with withdrawn_on_failure(adapter):
            if described.get("head"):
                adapter.add_head(lm)
        return adapter, template
    except (OptionError, InputError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise AdapterError(f"adapter {str(folder)!r}: {CONFIG} cannot be used: {error}") from error


def _fill(folder: Path, adapter: Adapter, lm: CausalLM) -> None:
    """Give an adapter its trained tensors."""
    try:
        tensors = load_file(folder / WEIGHTS, device=str(lm.device))
        prefix = _prefix(adapter)
        adapter.load_state_dict({key.removeprefix(prefix): value for key, value in tensors.items()})
    except (OSError, SafetensorError, RuntimeError) as error:
        first = " ".join(str(error).split())[:200]
        raise AdapterError(f"adapter {str(folder)!r}: {WEIGHTS} cannot be read: {first}") from error
    adapter.eval().requires_grad_(False)


def _calibration(folder: Path, name: str, sha256: str, template: Template, lm: CausalLM) -> Calibration | None:
    """Return a folder's calibration, if it has one and it is this adapter's."""
    path = folder / CALIBRATION
    if not path.exists():
        return None
    model = {"name": lm.name, "revision": lm.revision, "sha256": lm.sha256}
    facts = {
        "template": {"name": template.name, "fingerprint": template.fingerprint},
        "adapter": {"name": name, "sha256": sha256},
    }
    try:
        calibration = read_calibration(path)
        calibration.check(ScoreOrigin.of(model, facts), path)
    except InputError as error:
        raise AdapterError(f"adapter {str(folder)!r}: {error}") from error
    return calibration


def read_config(folder: Path) -> dict[str, Any]:
    """Return what `adapter_config.json` says (for LoRA `qpeft.json`), without opening a model.

    Raises:
        AdapterError: there is none, or it is not one of qpeft's.
    """
    path = folder / CONFIG
    described = _read_json(path)
    if isinstance(described, dict) and described.get("peft_type") == "LORA" and (folder / FACTS).is_file():
        path = folder / FACTS
        described = _read_json(path)
    kind = described.get("peft_type") if isinstance(described, dict) else None
    if kind not in ("QPEFT", "LORA") or not set(PARTS) - OPTIONAL <= set(described):
        raise AdapterError(f"{path}: not an adapter of qpeft (peft_type {kind!r})")
    for name, part in PARTS.items():
        if name in described and (isinstance(described[name], bool) or not isinstance(described[name], part)):
            raise AdapterError(f"{path}: {name!r} cannot be {described[name]!r:.60}")
    if (bound := described["max_passage_tokens"]) is not None and bound < 1:
        raise AdapterError(f"{path}: 'max_passage_tokens' is {bound}; it must be at least 1")
    return {"method": "query_likelihood", **described}


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


def _prefix(adapter: Adapter) -> str:
    """Return what stands before the names of an adapter's tensors in the file."""
    return "base_model." if adapter.peft_facts() else "base_model.qpeft."


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise AdapterError(f"no adapter in {str(path.parent)!r}: {path.name} is missing") from error
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{path}: not readable as JSON ({error})") from error


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
                f"adapter {str(folder)!r} was trained for {base.get('name')!r} with {words} {base[key]!s:.12}; "
                f"{lm.name!r} has {words} {found[key]!s:.12}"
            )
    if not (base.get("sha256") and found["sha256"]) and base.get("name") != found["name"]:
        raise AdapterError(f"adapter {str(folder)!r} was trained for {base.get('name')!r}, not for {lm.name!r}")
