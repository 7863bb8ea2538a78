"""Tokens of passages that come again: tokenising one takes longer than finding it."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence


class KeptTokens:
    """Tokens of the texts that were read last; prompts with one tokenizer may share them.

    Args:
        characters: length of all these texts together; text and tokens take some three bytes a character.
    """

    def __init__(self, characters: int = 32_000_000) -> None:
        self._characters = characters
        self._kept: OrderedDict[tuple[str, bool], array[int]] = OrderedDict()  # as a tuple, a token takes 36 bytes
        self._used = 0

    def get(self, text: str, space: bool, tokenize: Callable[[], Sequence[int]]) -> tuple[int, ...]:
        """Return a text's tokens, kept or made; `space`: whether one stands before it."""
        found = self._kept.get((text, space))
        if found is None:
            found = self._keep(text, space, tokenize())
        else:
            self._kept.move_to_end((text, space))
        return tuple(found)

    def read_ahead(
        self, texts: Iterable[str], space: bool, tokenize: Callable[[list[str]], Sequence[Sequence[int]]]
    ) -> None:
        """Make the tokens of texts that are not kept yet, all together."""
        new = [text for text in dict.fromkeys(texts) if text and (text, space) not in self._kept]
        for text, ids in zip(new, tokenize(new) if new else (), strict=True):
            self._keep(text, space, ids)

    def _keep(self, text: str, space: bool, ids: Sequence[int]) -> array[int]:
        self._kept[text, space] = kept = array("i", ids)
        self._used += len(text)
        while self._used > self._characters:
            (oldest, _), _ = self._kept.popitem(last=False)
            self._used -= len(oldest)
        return kept
