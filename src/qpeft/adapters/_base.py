"""What adapters have in common; for prompt adapters a view of the embedding table, marker words, one small network.

Shapes: `B` rows, `n` query tokens, `m` passage tokens, `L` hint vectors, `d` hidden size, `V` vocabulary.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from qpeft.adapters._choices import Init, Table
from qpeft.errors import OptionError, at_least
from qpeft.hints import Hints, Pairs
from qpeft.lm import CausalLM
from qpeft.read_out import Head


class Adapter(nn.Module, abc.ABC):
    """What can be trained: writes vectors into the input of a frozen language model, changes its layers, or both.

    Trained parameters are float32 whatever the model's type, and live on its device.
    """

    config: Any
    reads_layer: int | None = None
    reads_template = False
    changes_lm = False
    side_by_side = True

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
        table: its `whole_table`, which most adapters start from.
        lookup: whether tokens are looked up in the model's own table, or in a trainable copy of it.
    """

    def __init__(self, lm: CausalLM, table: Tensor, lookup: Table = "frozen") -> None:
        super().__init__()
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


class Markers(nn.Module):
    """The words around a hint, such as `hints:` and a newline; token ids, not trained."""

    def __init__(self, tokenizer: Any, prefix: str, suffix: str, device: torch.device) -> None:
        super().__init__()
        for name, text in (("prefix", prefix), ("suffix", suffix)):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
            self.register_buffer(name, torch.tensor(ids, dtype=torch.long, device=device), persistent=False)

    def __len__(self) -> int:
        return len(self.get_buffer("prefix")) + len(self.get_buffer("suffix"))

    def around(self, vectors: Tensor, mask: Tensor, adapter: PromptAdapter) -> tuple[Tensor, Tensor]:
        """Return vectors `[B, L, d]` and mask `[B, L]` with the markers before and after them."""
        pieces, masks = [], []
        for piece in (self.get_buffer("prefix"), None, self.get_buffer("suffix")):
            if piece is None:
                pieces.append(vectors)
                masks.append(mask)
            else:
                pieces.append(adapter.look_up(piece).expand(len(vectors), -1, -1))
                masks.append(mask.new_ones(len(vectors), len(piece)))
        return torch.cat(pieces, 1), torch.cat(masks, 1)


class HintNetwork(nn.Module):
    """The network that every vector of a hint passes through, `[…, d] → […, d]` (arXiv 2404.04522).

    * `default`: Linear → [ReLU → Linear] × layers, all of width d, with PyTorch's initialisation (the authors').
    * `residual_zero`: z + W2 ReLU(W1 z) through a bottleneck, W2 = 0 at the start, so that an untrained hint is the
      plain text of its tokens. Ours.

    Args:
        width: d.
        hidden: width of the bottleneck.
        layers: 0 leaves vectors as they are.
        init: which of the two.
        scale: root mean square of embeddings; the residual network works in units of it, so that one learning rate
            suits models of any embedding size.
    """

    def __init__(self, width: int, hidden: int, layers: int, init: Init, scale: float) -> None:
        super().__init__()
        if layers < 0 or (init == "residual_zero" and layers > 1):
            raise OptionError(f"--mlp-layers is {layers}; with residual_zero it is 0 or 1, else 0 or more")
        at_least(1, mlp_hidden=hidden)
        self._scale = scale
        self._residual = init == "residual_zero"
        steps: list[nn.Module] = []
        if layers and self._residual:
            out = nn.Linear(hidden, width)
            nn.init.zeros_(out.weight)
            nn.init.zeros_(out.bias)
            steps = [nn.Linear(width, hidden), nn.ReLU(), out]
        elif layers:
            steps = [nn.Linear(width, width)]
            for _ in range(layers):
                steps += [nn.ReLU(), nn.Linear(width, width)]
        self.steps = nn.Sequential(*steps)

    def forward(self, vectors: Tensor) -> Tensor:
        if not len(self.steps):
            return vectors
        out: Tensor = self.steps(vectors / self._scale if self._residual else vectors)
        return vectors + self._scale * out if self._residual else out


@torch.no_grad()
def whole_table(lm: CausalLM) -> Tensor:
    """Return the vectors of all tokens as they enter the model's layers, `[V, d]` float32."""
    size = lm.embeddings.weight.shape[0]
    ids = torch.arange(size, device=lm.device)
    return torch.cat([lm.embeddings(part).float() for part in torch.split(ids, 8192)])
