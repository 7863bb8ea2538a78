"""What an adapter is: what it reads of pairs, the vectors that it writes, what a language model needs to know of it.

Shapes: `B` rows, `n` query tokens, `m` passage tokens, `L` hint vectors, `d` hidden size, `V` vocabulary.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from qpeft.errors import OptionError

if TYPE_CHECKING:
    from qpeft.lm.causal import CausalLM
    from qpeft.lm.read_out import Head


@dataclass(frozen=True, slots=True)
class Pairs:
    """A batch of (query, passage) pairs as an adapter reads them.

    `query` `[B, n]` and `passage` `[B, m]` are token ids, right-padded, with masks of the same shapes. `states`
    `[B, m, d]` are the frozen model's hidden states at the passage's tokens, for adapters that ask for them.
    """

    query: Tensor
    query_mask: Tensor
    passage: Tensor
    passage_mask: Tensor
    states: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Hints:
    """Vectors that stand in the input, `[B, L, d]`, and which of them count, `[B, L]`.

    For explanations, what an adapter knows of the reasons: `chosen` `[B, k]` positions of the passage (−1: none), or
    `attention` `[B, n, m]` from query tokens to passage tokens.
    """

    vectors: Tensor
    mask: Tensor
    chosen: Tensor | None = None
    attention: Tensor | None = None


class Adapter(nn.Module, abc.ABC):
    """What can be trained: writes vectors into the input of a frozen language model, changes its layers, or both.

    Trained parameters are float32 whatever the model's type, and live on its device.
    """

    config: Any
    """The options that it was made with; `qpeft.adapters.build` sets it."""
    reads_layer: int | None = None
    """Which hidden states are to be passed as `Pairs.states`: an index into the model's layers; None: none."""
    reads_template: bool = False
    """Whether the words of the template count as passage."""
    changes_lm: bool = False
    """Whether it changes the model's layers (LoRA), so that nothing encoded without it may be used."""
    side_by_side: bool = True
    """Whether several threads may score with it at once."""

    @property
    def head(self) -> Head | None:
        """What was trained on the state of the last token; there is none where nothing was."""
        return None

    def add_head(self, lm: CausalLM) -> None:
        """Let a head on the last token be trained too.

        Raises:
            OptionError: this adapter has no place for one.
        """
        raise OptionError("--method classifier trains a head, which goes with --adapter lora")

    @abc.abstractmethod
    def hint_length(self, query_tokens: int) -> int:
        """Return the largest number of vectors for a query of so many tokens."""

    @abc.abstractmethod
    def forward(self, pairs: Pairs) -> Hints:
        """Write the hints of a batch."""

    def applied(self) -> AbstractContextManager[None]:
        """Return a context in which the model is changed, for adapters that do so."""
        return nullcontext()

    def withdraw(self) -> None:
        """Take back what was put into the model, once; an adapter that changes it cannot be used afterwards."""

    def peft_facts(self) -> dict[str, Any]:
        """Return PEFT's configuration of what changes the model; there is none where nothing does."""
        return {}

    def count_parameters(self) -> int:
        """Return how many parameters training changes; the same before it, in its midst and after loading."""
        return sum(parameter.numel() for parameter in self.parameters())


@contextmanager
def withdrawn_on_failure(adapter: Adapter) -> Iterator[None]:
    """Take an adapter out of the model again where what goes with it, within this context, fails."""
    try:
        yield
    except BaseException:
        adapter.withdraw()
        raise


class PromptAdapter(Adapter):
    """Writes vectors into the input of a frozen language model.

    Args:
        lm: the frozen model; only its embedding layer is kept, and it is not a part of the adapter.
        table: its `whole_table`, where it has been made already.
        lookup: whether tokens are looked up in the model's own table, or in a trainable copy of it.
    """

    def __init__(
        self, lm: CausalLM, table: Tensor | None = None, *, lookup: Literal["frozen", "trainable"] = "frozen"
    ) -> None:
        super().__init__()
        table = whole_table(lm) if table is None else table
        self._frozen = (lm.embeddings,)  # in a tuple, so that it is not taken for a part of this module
        self.width = table.shape[1]
        self.scale = float(table.pow(2).mean().sqrt())
        """Root mean square of the entries of the embedding table: the size that hint vectors should have."""
        self.token_table = nn.Parameter(table) if lookup == "trainable" else None

    def look_up(self, ids: Tensor) -> Tensor:
        """Return the vectors of tokens, `[…] → […, d]` float32, from the trainable copy if there is one."""
        if self.token_table is not None:
            return nn.functional.embedding(ids, self.token_table)
        return self.look_up_frozen(ids)

    def look_up_frozen(self, ids: Tensor) -> Tensor:
        """Return the vectors of tokens, `[…] → […, d]` float32, from the frozen model."""
        with torch.no_grad():
            vectors: Tensor = self._frozen[0](ids).float()
        return vectors


@torch.no_grad()
def whole_table(lm: CausalLM) -> Tensor:
    """Return the vectors of all tokens as they enter the model's layers, `[V, d]` float32."""
    size = lm.embeddings.weight.shape[0]
    ids = torch.arange(size, device=lm.device)
    return torch.cat([lm.embeddings(part).float() for part in torch.split(ids, 8192)])
