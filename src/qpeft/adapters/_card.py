"""The model card of an adapter folder."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_ON_HUB = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
"""A model's name on the hub, which refuses cards that have another; the adapter may be of a folder's model."""
_SCORES = {
    "query_likelihood": "the log-likelihood of the query",
    "classifier": "the output of the head",
    "yes_no": "the log-odds of the two answers",
}


def card(described: Mapping[str, Any], provenance: Mapping[str, Any]) -> str:
    """Return Markdown with the front matter of the model hub.

    Args:
        described: the contents of `adapter_config.json`.
        provenance: what made it; `dev` and `training` are shown where present.
    """
    method, base = described.get("method", "query_likelihood"), described["base_model_name_or_path"]
    lines = [
        "---",
        "library_name: qpeft",
        *([f"base_model: {base}"] if _ON_HUB.fullmatch(base) and not Path(base).exists() else []),
        "pipeline_tag: text-ranking",
        f"tags: [reranker, {method.replace('_', '-')}, qpeft]",
        "---",
        "",
        f"# {described['adapter']} for {base}",
        "",
        f"A {method.replace('_', '-')} reranker: the language model is frozen, this adapter {_does(described)}, and",
        f"passages are ranked by {_SCORES.get(method, 'its score')}.",
        "",
        "```python",
        "from qpeft import Reranker",
        "",
        f'reranker = Reranker.from_pretrained("{base}", adapter="path/to/this/folder")',
        "```",
        "",
        f"* trained parameters: {described['trained_parameters']:,}",
        f"* template: {described['template']['name']} (version {described['template']['version']})",
    ]
    of_all = {**described["options"], **described.get("method_options", {})}
    lines += [f"* {name}: {json.dumps(value)}" for name, value in of_all.items()]
    for title, key in (("Training", "training"), ("Dev", "dev")):
        facts = provenance.get(key)
        if facts:
            known = [f"* {name}: {value}" for name, value in facts.items() if value is not None]
            lines += ["", f"## {title}", "", *known]
    return "\n".join(lines) + "\n"


def _does(described: Mapping[str, Any]) -> str:
    if described["peft_type"] != "LORA":
        return "writes vectors into its input"
    hint = " and vectors to its input" if described["options"].get("hint") else ""
    head = " and a head to its last token" if described.get("method") == "classifier" else ""
    return "adds low-rank matrices to its layers" + head + hint
