"""Token ids as pieces of text that a reader recognises.

A tokenizer lowers case, marks blanks (Ġ, ▁) and cuts words (##); what was written is in the text. So where the text is
known, a token is shown as the characters that it covers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def pieces(tokenizer: Any, ids: Sequence[int], text: str = "") -> list[str]:
    """Return one piece for each token; a blank before a word belongs to the word's first piece.

    Pieces of a known text join to it, up to where the tokens end. Of several tokens that share a character, the first
    has it and the others are empty.

    Args:
        tokenizer: a Hugging Face tokenizer.
        ids: the text's tokens, or the first of them.
        text: what was tokenised; if it is not known, or gives other tokens, they are decoded one by one.
    """
    if text and getattr(tokenizer, "is_fast", False):
        for lead in ("", " "):
            coded = tokenizer(lead + text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            if list(coded["input_ids"][: len(ids)]) == list(ids):
                return _slices(text, [max(end - len(lead), 0) for _, end in coded["offset_mapping"][: len(ids)]])
    return [_decoded(tokenizer, token) for token in ids]


def words(texts: Sequence[str]) -> list[str]:
    """Return pieces as they can be listed apart: without blanks, `…` where a word goes on before a piece."""
    listed = []
    for place, text in enumerate(texts):
        before = texts[place - 1][-1:] if place else ""
        inside = before.isalnum() and text[:1].isalnum()
        listed.append(("…" if inside else "") + (text.strip() or ("␣" if text else "·")))
    return listed


def _slices(text: str, ends: Sequence[int]) -> list[str]:
    found, start = [], 0
    for end in ends:
        found.append(text[start : max(start, end)])
        start = max(start, end)
    return found


def _decoded(tokenizer: Any, token: int) -> str:
    name = str(tokenizer.convert_ids_to_tokens(token))
    if name.startswith("##"):
        return name.removeprefix("##")
    text = str(tokenizer.decode([token], clean_up_tokenization_spaces=False)) or name
    return f" {text.strip()}" if name.startswith(("▁", "Ġ")) else text
