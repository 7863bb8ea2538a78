"""What all language models share: the protocol that methods see, batches within a memory budget, exact log-softmax.

Rows are sorted by length, padded within batches that hold a bounded number of tokens, and come back in the order given.

Shapes: `B` rows, `T` positions, `N` scored positions of a batch, `K` scored positions of a row, `V` vocabulary.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from qpeft.adapter import Adapter
from qpeft.errors import ModelError, OptionError, QpeftError
from qpeft.lm.compiled import Compiled
from qpeft.lm.context_store import ContextStore
from qpeft.lm.flops import Computed, shape_of
from qpeft.lm.read_out import Answers, Head, ReadOut
from qpeft.lm.side_by_side import SideBySide
from qpeft.lm.waiting import Waiting
from qpeft.provenance import weights_fingerprint
from qpeft.template import Row

T = TypeVar("T")
ALIKE = 4
"""On CPUs a batch has such a multiple of rows where more wait: a kernel is compiled for every number of tokens that is
new, and with AMX that takes as long as a sixth of a batch."""
LOGITS = 2**28
"""Numbers that the head may write in one forward pass, unless a single row needs more: half a GiB of bf16."""


@dataclass(frozen=True, slots=True)
class RowLogProbs:
    """Natural log-probabilities of a row's tokens, float32 on the CPU.

    `target` `[K]` are the scored target tokens; `passage` `[m]` the passage's tokens, where they were asked for.
    """

    target: Tensor
    passage: Tensor | None = None


class PretrainedLM:
    """What decoder-only and encoder-decoder models share: batches, memory, order.

    Attributes:
        head: a head on the last token that came with the model, if one did.
        has_words: whether the model predicts tokens; one that was saved as a classifier does not.
        compiled: the parts of its layers that were compiled, if any were.
        quantization: of its weights, as the option `--quantization` spells it.
        store: what keeps encoded contexts, if anything does.
    """

    has_encoder: bool
    head: Head | None = None
    has_words: bool = True
    compiled: Compiled | None = None
    store: ContextStore | None = None

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        name: str,
        max_length: int,
        batch_tokens: int,
        folder: Path | None = None,
        quantization: str = "none",
    ) -> None:
        self.name = name
        self.quantization = quantization
        self._folder = folder
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.model = model.eval().requires_grad_(False)
        self.batch_tokens = batch_tokens
        self.shape = shape_of(self.model)
        self.computed = Computed()
        self._turn = threading.Lock()  # one call at a time; its batches may run side by side
        self._counting = threading.Lock()
        self._beside = SideBySide()

    @property
    def batch_tokens(self) -> int:
        """Padded tokens that a forward may have."""
        return self._batch_tokens

    @batch_tokens.setter
    def batch_tokens(self, count: int) -> None:
        self._batch_tokens = count
        self._budget = count  # halved when memory runs out, grows back afterwards

    @property
    def device(self) -> torch.device:
        """Where inputs are sent."""
        return torch.device(self.model.device)

    @property
    def dtype(self) -> str:
        """Name of the weights' type, as the option `--dtype` spells it."""
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def attention_kernel(self) -> str:
        """Name of what computes attention, as transformers knows it."""
        return str(self.model.config._attn_implementation)

    @property
    def revision(self) -> str | None:
        """Commit on the model hub, if the model came from there."""
        commit: str | None = getattr(self.model.config, "_commit_hash", None)
        return commit

    @functools.cached_property
    def sha256(self) -> str | None:
        """Hash of the weight files and the configuration; None for a model that came from the hub or from memory."""
        return None if self._folder is None else weights_fingerprint(self._folder)

    def describe(self) -> dict[str, Any]:
        """Return what provenance says of the model."""
        return {
            "name": self.name,
            "revision": self.revision,
            "sha256": self.sha256,
            "dtype": self.dtype,
            "device": str(self.device),
            "attention_kernel": self.attention_kernel,
            "compiled": self.compiled is not None,
            "batch_tokens": self.batch_tokens,
            "quantization": self.quantization,
            "max_length": self.max_length,
        }

    @torch.no_grad()
    def log_probs(
        self,
        rows: Sequence[Row],
        *,
        with_passage: bool = False,
        adapters: Adapter | Sequence[Adapter | None] | None = None,
        depth: int | None = None,
    ) -> list[RowLogProbs]:
        """Return the log-probabilities of each row's scored tokens, in order. Threads may call it; they take turns.

        Args:
            rows: token ids, of any lengths.
            with_passage: also return those of the passage's tokens (decoder-only models).
            adapters: what writes the hints: one adapter for all rows, or one (or None) for each.
            depth: run the first so many layers only, then the model's last norm and head; all of them by default.

        Raises:
            ModelError: a single row does not fit in memory.
            OptionError: see `check_depth`.
        """
        each = list(adapters) if isinstance(adapters, Sequence) else [adapters] * len(rows)
        if depth is not None:
            self.check_depth(depth, each)
        self.check_words()
        scored = [sum(row.scored) + (row.passage[1] - row.passage[0] if with_passage else 0) for row in rows]
        with self._turn, nullcontext() if depth is None else self._first_layers(depth):
            mixed = not with_passage and self._reads_contexts(rows, each)
            return self._in_batches(rows, each, scored, lambda some, own: self._forward(some, with_passage, own), mixed)

    @torch.no_grad()
    def read(
        self,
        rows: Sequence[Row],
        read_out: ReadOut,
        *,
        adapters: Adapter | Sequence[Adapter | None] | None = None,
    ) -> list[Tensor]:
        """Return what is read at the last token of each row, `[k]` float32 on the CPU, in order.

        Args:
            rows: token ids without targets, of any lengths.
            read_out: what is read.
            adapters: as in `log_probs`.

        Raises:
            ModelError: a single row does not fit in memory, or the model has not what is to be read.
        """
        each = list(adapters) if isinstance(adapters, Sequence) else [adapters] * len(rows)
        scored = [int(isinstance(read_out, Answers))] * len(rows)
        if isinstance(read_out, Answers):
            self.check_words()
        with self._turn:
            return self._in_batches(rows, each, scored, lambda some, own: self._read(some, read_out, own))

    def check_words(self) -> None:
        """Raise ModelError for a model that predicts no tokens."""
        if not self.has_words:
            raise ModelError(f"{self.name} was saved as a classifier and predicts no tokens: --method classifier")

    def check_depth(self, depth: int, adapters: Sequence[Adapter | None] = ()) -> None:
        """Raise the error that scoring with the first `depth` layers would end in.

        Raises:
            OptionError: the model has an encoder, or no list of layers that can be told, or not more layers than that;
                or an adapter reads states that lie deeper.
        """
        raise OptionError(f"{self.name}: only decoder-only models can be cut to their first layers")

    def _first_layers(self, depth: int) -> AbstractContextManager[None]:
        raise NotImplementedError

    def _reads_contexts(self, rows: Sequence[Row], adapters: Sequence[Adapter | None]) -> bool:
        """Whether contexts that were encoded before are read one by one, so that rows need not be of like length."""
        return False

    def _make_room(self) -> bool:
        """Give up memory that the next row could use, and say whether there was any."""
        return False

    def _count(self, tokens: int, padding: int, flops: int | None) -> None:
        with self._counting:
            self.computed.add(tokens, padding, flops)

    def _in_batches(
        self,
        rows: Sequence[Row],
        each: Sequence[Adapter | None],
        scored: Sequence[int],
        forward: Callable[[list[Row], list[Adapter | None]], list[T]],
        mixed: bool = False,
    ) -> list[T]:
        """Return what `forward` returns of each row, in order.

        Args:
            rows: token ids.
            each: the adapter of each row.
            scored: positions of each at which the head runs.
            forward: computes one batch.
            mixed: long and short rows may share a batch at no cost.
        """
        results: list[T | None] = [None] * len(rows)

        @torch.no_grad()
        def run(chosen: list[int]) -> list[int]:
            """Return the rows that did not fit in memory: all or none."""
            try:
                values = forward([rows[i] for i in chosen], [each[i] for i in chosen])
            except RuntimeError as error:
                if not says_no_room(error):
                    raise
                return chosen
            for i, value in zip(chosen, values, strict=True):
                results[i] = value
            return []

        sizes = [len(row) + (a.hint_length(len(row.query)) if a else 0) for row, a in zip(rows, each, strict=True)]
        positions = LOGITS // self.model.config.get_text_config().vocab_size
        waiting = Waiting(sizes, scored, positions, ALIKE if self.device.type == "cpu" else 1)
        able = self.device.type == "cpu" and all(adapter is None or adapter.side_by_side for adapter in each)
        beside = min(len(rows), self._beside.width()) if able else 1
        if beside > 1:
            # As many batches for each thread, of as many tokens: then none waits long for the others.
            batches = beside * math.ceil(sum(sizes) / self._budget)
            together = waiting.dealt(batches) if mixed else [*waiting.batches(batches, beside)]
            for failed in self._beside.run(run, together):
                waiting.put_back(failed)
        while waiting:
            chosen = waiting.take(self._budget)
            if run(chosen):
                if len(chosen) == 1 and not self._make_room():
                    raise ModelError(f"{sizes[chosen[0]]} tokens do not fit in the memory of {self.device}")
                getattr(torch.get_device_module(self.device), "empty_cache", lambda: None)()
                self._budget = len(chosen) * sizes[chosen[0]] // 2
                waiting.put_back(chosen)
        self._budget = min(self.batch_tokens, self._budget * 2)
        return [result for result in results if result is not None]

    def _forward(
        self, rows: Sequence[Row], with_passage: bool, adapters: Sequence[Adapter | None]
    ) -> list[RowLogProbs]:
        raise NotImplementedError

    def _read(self, rows: Sequence[Row], read_out: ReadOut, adapters: Sequence[Adapter | None]) -> list[Tensor]:
        raise NotImplementedError


def says_no_room(error: RuntimeError) -> bool:
    """Whether memory ran out; not every device (MPS) raises an error of its own for that."""
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)


@contextmanager
def within_memory(otherwise: QpeftError) -> Iterator[None]:
    """Raise an error that says what to do where memory runs out within this context."""
    try:
        yield
    except RuntimeError as error:
        if not says_no_room(error):
            raise
        raise otherwise from error


def pad_ids(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Right-pad with zeros: ids `[B, T]` and mask `[B, T]`."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], dtype=torch.long)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], dtype=torch.long)
    return ids, mask


def token_log_probs(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return `log softmax(logits)[tokens]` in float32.

    A few positions at a time are converted to float32: on a CPU as many as stay in a core's cache memory, elsewhere as
    many as keep the copy small. For backpropagation the logits are kept as they are, and converted again.

    Args:
        logits: `[N, V]`, any floating dtype.
        tokens: `[N]`.

    Returns:
        `[N]`.

    """
    found: Tensor = _TokenLogProbs.apply(logits, tokens)  # type: ignore[no-untyped-call]
    return found


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor) -> Tensor:
        parts = [-cross_entropy(some.float(), chosen, reduction="none") for some, chosen in _few(logits, tokens)]
        values = torch.cat(parts) if parts else logits.new_zeros(0, dtype=torch.float32)
        ctx.save_for_backward(logits, tokens, values)
        return values

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        logits, tokens, values = ctx.saved_tensors
        out = torch.empty_like(logits)
        for some, chosen, value, own, target in _few(logits, tokens, values, grad, out):
            column = chosen[:, None]
            exact = some.float()
            exact -= exact.gather(1, column) - value[:, None]  # now log-probabilities
            exact.exp_().mul_(-own[:, None]).scatter_add_(1, column, own[:, None])
            target.copy_(exact)
        return out, None


def _few(logits: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield some positions of each at a time, so few that the logits' copy in float32 is small."""
    count = max(1, (2**18 if logits.device.type == "cpu" else 2**26) // logits.shape[1])
    return zip(*(torch.split(each, count) for each in (logits, *others)), strict=True)
