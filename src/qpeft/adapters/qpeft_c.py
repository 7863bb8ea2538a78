"""Q-PEFT-C: Q-PEFT-A whose keys and values also read what the model made of the passage (ours).

Static embeddings say which word stands where, not what it means there. The frozen model has encoded the passage anyway,
and its hidden states h_j at the passage's tokens come with the stored context. They enter next to the embeddings:

    key_j = W_k x_j + W_kc h_j        value_j = W_v x_j + W_vc h_j        W_kc = 0 at the start

so that an untrained Q-PEFT-C is an untrained Q-PEFT-A.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qpeft.adapters import qpeft_a
from qpeft.errors import OptionError

if TYPE_CHECKING:
    from qpeft.adapter import Adapter
    from qpeft.lm.causal import CausalLM


@dataclass(frozen=True)
class Config(qpeft_a.Config):
    """Options of Q-PEFT-C."""

    layer: int = -1
    """Hidden states after which layer; negative counts from the last."""
    attn_dim: int = 48
    """Sum of the widths of the heads."""
    mlp_hidden: int = 48
    """Width of the bottleneck."""


def build(config: Config, lm: CausalLM) -> Adapter:
    """Return an untrained module for a model.

    Raises:
        OptionError: options out of range, or a model that remembers more of a passage than is kept of it.
    """
    layers = lm.model.config.get_text_config().num_hidden_layers
    layer = config.layer + layers + 1 if config.layer < 0 else config.layer
    if not 0 <= layer <= layers:
        raise OptionError(f"--layer is {config.layer}; the model has {layers} layers")
    if config.attn_init != "cosine":
        raise OptionError("--attn-init of qpeft_c is cosine")
    if not lm.goes_on:
        raise OptionError(f"qpeft_c goes on from encoded passages, which {lm.name} cannot: it remembers more of them")
    from qpeft.adapters._qpeft_a import QPeftA  # torch, only when there is work

    return QPeftA(config, lm, reads_layer=layer)
