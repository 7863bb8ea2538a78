"""Options of opening a model; apart from `loading`, so that they can be listed without importing torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qpeft.errors import at_least
from qpeft.options import Checked

EMBEDDED = "tiny-lm"
"""The language model that ships with qpeft."""


@dataclass(frozen=True)
class ModelConfig(Checked):
    """Which language model, and how it is held."""

    model: str = EMBEDDED
    """tiny-lm (embedded), a local folder, or a name on the model hub."""
    revision: str | None = None
    """Branch, tag or commit of a model on the hub."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: bfloat16 on GPUs that have it, float16 on older ones; on CPUs whichever of bfloat16 and float32 multiplies
    faster here."""
    device: str = "auto"
    """auto (cuda, then mps, then cpu), or a torch device such as cuda:1."""
    attention_kernel: str = "auto"
    """auto (on CPUs our own), or a name that transformers knows: eager, sdpa; on GPUs flash_attention_2,
    flex_attention."""
    compile: Literal["auto", "yes", "no"] = "auto"
    """Compile norms, MLPs and rotations (torch.compile) when opened; auto: if doctor --tune found that quicker."""
    quantization: Literal["none", "8bit", "4bit"] = "none"
    """Load weights in 8 bits (LLM.int8(), which multiplies in float16) or 4 (NF4); needs bitsandbytes."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""
    batch_tokens: int | None = None
    """Padded tokens in one forward pass; halved for as long as memory runs out."""
    passage_cache: float | None = None
    """GiB of the device's memory for encoded passages: a second query is cheap then (query likelihood, no LoRA); by
    default 4 in training and 0 elsewhere."""
    passage_cache_folder: str | None = None
    """Folder for encoded passages that memory does not hold; qpeft index-cache fills it ahead."""
    passage_cache_storage: Literal["exact", "int8", "fp8"] = "exact"
    """How encoded passages are kept; 8 bits take about half the room and change scores a little."""
    max_length: int | None = None
    """Tokens that template, passage and query may have together; default: what the model was made for."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, batch_tokens=self.batch_tokens, max_length=self.max_length)
        at_least(0, passage_cache=self.passage_cache)
