"""Tokens of passages that come again: tokenising one takes longer than finding it."""

from __future__ import annotations

import threading
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence


class KeptTokens:
    """Tokens of the texts that were read last; prompts with one tokenizer may share them, and threads.

    Args:
        characters: length of all these texts together; text and tokens take some three bytes a character.
    """

    def __init__(self, characters: int = 32_000_000) -> None:
        self._characters = characters
        self._kept: OrderedDict[tuple[str, bool], array[int]] = OrderedDict()  # as a tuple, a token takes 36 bytes
        self._used = 0
        self._lock = threading.Lock()

    def get(self, text: str, space: bool, tokenize: Callable[[], Sequence[int]]) -> tuple[int, ...]:
        """Return a text's tokens, kept or made; `space`: whether one stands before it."""
        with self._lock:
            found = self._kept.get((text, space))
            if found is not None:
                self._kept.move_to_end((text, space))
        return tuple(self._keep(text, space, tokenize()) if found is None else found)

    def read_ahead(
        self, texts: Iterable[str], space: bool, tokenize: Callable[[list[str]], Sequence[Sequence[int]]]
    ) -> None:
        """Make the tokens of texts that are not kept yet, all together."""
        with self._lock:
            new = [text for text in dict.fromkeys(texts) if text and (text, space) not in self._kept]
        for text, ids in zip(new, tokenize(new) if new else (), strict=True):
            self._keep(text, space, ids)

    def _keep(self, text: str, space: bool, ids: Sequence[int]) -> array[int]:
        kept = array("i", ids)
        with self._lock:
            if self._kept.pop((text, space), None) is None:  # another thread may have read it meanwhile
                self._used += len(text)
            self._kept[text, space] = kept
            while self._used > self._characters:
                (oldest, _), _ = self._kept.popitem(last=False)
                self._used -= len(oldest)
        return kept
