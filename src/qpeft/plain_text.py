"""Tokens of texts in which the name of a special token is a word like others: a passage may be about HTML's `<s>`."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

_SPLITTING: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


class PlainText:
    """Tokenises queries and passages, which may say anything; what a template says, `</s>` included, is meant.

    Args:
        tokenizer: a Hugging Face tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        names = [re.escape(token.content) for token in tokenizer.added_tokens_decoder.values() if token.special]
        self._special = re.compile("|".join(names)) if names else None

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, without a beginning or an end of its own."""
        if not texts:
            return []
        found: list[list[int]] = self._tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        for i, text in enumerate(texts):
            if self._special is not None and self._special.search(text):
                found[i] = self._splitting()(text, add_special_tokens=False, split_special_tokens=True, verbose=False)[
                    "input_ids"
                ]
        return found

    def _splitting(self) -> Any:
        """Return a tokenizer that has been told to split them: one in Rust stays so, for whoever uses it next."""
        if not getattr(self._tokenizer, "is_fast", False):
            return self._tokenizer
        if self._tokenizer not in _SPLITTING:
            _SPLITTING[self._tokenizer] = copy.deepcopy(self._tokenizer)
        return _SPLITTING[self._tokenizer]
