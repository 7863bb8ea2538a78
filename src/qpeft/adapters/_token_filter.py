"""Which passage tokens may become hints: the letters of the option `token_filter` (Q-PEFT, arXiv 2404.04522).

d   each token once
q   no token of the query
s   no stop-word
a   no token without a letter a–z
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from qpeft.errors import OptionError

LETTERS = "dqsa"
# Lucene's English stop-words, and what is left of contractions and addresses.
STOPWORDS = frozenset(
    re.findall(
        r"\w+",
        "a an and are as at be but by for if in into is it no not of on or such that the their then there these they "
        "this to was will with s t www",
    )
)


class TokenFilter(nn.Module):
    """A filter bound to a vocabulary.

    Args:
        letters: a combination of the letters above.
        tokenizer: whose vocabulary.
        size: entries of the embedding table.
        device: of the inputs.

    Raises:
        OptionError: an unknown letter.
    """

    def __init__(self, letters: str, tokenizer: Any, size: int, device: torch.device) -> None:
        super().__init__()
        unknown = set(letters) - set(LETTERS)
        if unknown:
            raise OptionError(
                f"--token-filter {letters!r}: unknown letter {min(unknown)!r}; known: {', '.join(LETTERS)}"
            )
        self.letters = letters
        barred = torch.zeros(size, dtype=torch.bool)
        for token, place in tokenizer.get_vocab().items():
            if place < size:
                barred[place] = self._bars(token)
        for place in tokenizer.all_special_ids:
            if place < size:
                barred[place] = True
        self.register_buffer("barred", barred.to(device), persistent=False)

    def _bars(self, token: str) -> bool:
        byte = re.fullmatch("<0x([0-9A-F]{2})>", token)  # SentencePiece's name of a byte
        if byte:
            token = chr(int(byte[1], 16))
        word = token.removeprefix("##").lstrip("▁Ġ").lower()
        stop = "s" in self.letters and word in STOPWORDS and not token.startswith("##")
        return stop or ("a" in self.letters and not any("a" <= letter <= "z" for letter in word))

    def forward(self, query: Tensor, query_mask: Tensor, passage: Tensor, passage_mask: Tensor) -> Tensor:
        """Return which passage positions may be used, `[B, m]`; where none is left, all real ones."""
        allowed = passage_mask & ~self.get_buffer("barred")[passage]
        if "q" in self.letters:
            same = (passage[:, :, None] == query[:, None, :]) & query_mask[:, None, :]
            allowed = allowed & ~same.any(2)
        return torch.where(allowed.any(1, keepdim=True), allowed, passage_mask)

    @property
    def distinct(self) -> bool:
        """Whether each token counts once."""
        return "d" in self.letters


def first_occurrences(ids: Tensor, mask: Tensor) -> Tensor:
    """Return which real positions hold a token that stands at no earlier real one, `[B, m]`."""
    same = (ids[:, :, None] == ids[:, None, :]) & mask[:, None, :]
    return mask & ~same.tril(diagonal=-1).any(2)
