"""Add a LoRA adapter to its model, and write a model folder that needs neither the adapter nor peft.

Of a classifier, the folder holds transformers' class ...ForSequenceClassification where the architecture has one. The
sums are made in float32, and stored in the type that the model is stored in, unless --dtype says otherwise.
"""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qpeft.atomic import replacing_folder
from qpeft.commands._output import check_replaced
from qpeft.data.records import read_json, write_json
from qpeft.errors import InputError, StateError
from qpeft.model_config import ModelConfig
from qpeft.provenance import provenance

PROVENANCE, TEMPLATE = "provenance.json", "template.yaml"


@dataclass(frozen=True)
class Config:
    """Merging."""

    adapter: str
    """Folder of a trained LoRA adapter."""
    output: str
    """The model folder to write."""


def run(config: Config, model: ModelConfig) -> None:
    """Merge, write the folder, and say how it is used."""
    output = Path(config.output)
    if output.exists():
        if not ((output / PROVENANCE).is_file() and (output / "config.json").is_file()):
            raise StateError(f"{output} exists and is no folder of a merged model")
        check_replaced(output, "a merged model", read_json(output / PROVENANCE).get("files", ()))
    import torch
    import yaml
    from transformers import AutoConfig

    from qpeft.adapters._folder import base_identity, open_adapter
    from qpeft.adapters._merge import merge
    from qpeft.loading import DTYPES, load_lm, model_path

    lm: Any = load_lm(dataclasses.replace(model, dtype="float32"))
    opened = open_adapter(config.adapter, lm, None)
    base = base_identity(lm)
    merged, beside = merge(lm, opened)
    code = model.trust_remote_code
    stored = AutoConfig.from_pretrained(model_path(model.model), revision=model.revision, trust_remote_code=code).dtype
    dtype = (
        DTYPES[model.dtype]
        if model.dtype != "auto"
        else getattr(torch, str(stored or "float32").removeprefix("torch."))
    )
    merged.to(dtype)
    tensors = {**merged.state_dict(), **{name: tensor.to(dtype) for name, tensor in beside.items()}}
    with _writing(output) as temporary:
        merged.save_pretrained(temporary, state_dict=tensors)
        lm.tokenizer.save_pretrained(temporary)
        template = {
            k: v for k, v in dataclasses.asdict(opened.template).items() if v is not None and v is not False and v != ""
        }
        (temporary / TEMPLATE).write_text(yaml.safe_dump(template, sort_keys=False, allow_unicode=True), "utf-8")
        facts = {
            "command": "merge",
            "base": base,
            "adapter": {"name": opened.name, "folder": config.adapter, "sha256": opened.sha256},
            "method": {"name": opened.method, **opened.method_options},
            "template": opened.template.fingerprint,
            "max_passage_tokens": opened.max_passage_tokens,
            "dtype": str(dtype).removeprefix("torch."),
            "files": sorted({path.name for path in temporary.iterdir()} | {PROVENANCE}),
        }
        write_json(temporary / PROVENANCE, provenance(**facts))
    options = ["--model", str(output), "--method", opened.method, "--template", str(output / TEMPLATE)]
    if opened.max_passage_tokens is not None:
        options += ["--max-passage-tokens", str(opened.max_passage_tokens)]
    for name, value in opened.method_options.items():
        options += [f"--{name}", str(value)]
    print(f"{output}: {type(merged).__name__}, {facts['dtype']}", file=sys.stderr)
    if beside:
        print("  note: the head stands beside the language model; only qpeft reads it there", file=sys.stderr)
    print(f"  use it with {shlex.join(options)}", file=sys.stderr)


@contextmanager
def _writing(output: Path) -> Iterator[Path]:
    from safetensors import SafetensorError

    try:
        with replacing_folder(output) as temporary:
            yield temporary
    except (OSError, SafetensorError) as error:
        raise InputError(f"{output} cannot be written: {error}") from error
