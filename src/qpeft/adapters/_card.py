"""The model card of an adapter folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def card(described: Mapping[str, Any], provenance: Mapping[str, Any]) -> str:
    """Return Markdown with the front matter of the model hub.

    Args:
        described: the contents of `adapter_config.json`.
        provenance: what made it; `dev` and `training` are shown where present.
    """
    lines = [
        "---",
        "library_name: qpeft",
        f"base_model: {described['base_model_name_or_path']}",
        "pipeline_tag: text-ranking",
        "tags: [reranker, query-likelihood, qpeft]",
        "---",
        "",
        f"# {described['adapter']} for {described['base_model_name_or_path']}",
        "",
        f"A query-likelihood reranker: the language model is frozen, this adapter {_does(described)}, and",
        "passages are ranked by the log-likelihood of the query.",
        "",
        "```python",
        "from qpeft import Reranker",
        "",
        f'reranker = Reranker.from_pretrained("{described["base_model_name_or_path"]}", adapter="path/to/this/folder")',
        "```",
        "",
        f"* trained parameters: {described['trained_parameters']:,}",
        f"* template: {described['template']['name']} (version {described['template']['version']})",
    ]
    lines += [f"* {name}: {json.dumps(value)}" for name, value in described["options"].items()]
    for title, key in (("Training", "training"), ("Dev", "dev")):
        facts = provenance.get(key)
        if facts:
            lines += ["", f"## {title}", "", *(f"* {name}: {value}" for name, value in facts.items())]
    return "\n".join(lines) + "\n"


def _does(described: Mapping[str, Any]) -> str:
    if described["peft_type"] != "LORA":
        return "writes vectors into its input"
    hint = " and vectors to its input" if described["options"]["hint"] else ""
    return "adds low-rank matrices to its layers" + hint
