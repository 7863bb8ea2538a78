"""BM25 by bm25s: title and text in one field, the library's Lucene variant and defaults (k1 1.5, b 0.75)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bm25s
import Stemmer

from qpeft.errors import InputError, OptionError, at_least, nearest
from qpeft.options import Checked
from qpeft.retrieval._index_folder import new_index_folder, read_index_folder
from qpeft.types import Passage, Query, Ranking

STOPWORDS = frozenset({
    "da", "danish", "de", "german", "en", "english", "en_plus", "english_plus", "es", "spanish", "fr", "french",
    "it", "italian", "ko", "korean", "nl", "dutch", "no", "norwegian", "pt", "portuguese", "ru", "russian",
    "sv", "swedish", "tr", "turkish", "zh", "chinese",
})  # fmt: skip
"""Languages whose stop-words bm25s has; it does not list them itself."""


@dataclass(frozen=True)
class Config(Checked):
    """Options of BM25."""

    stemmer: str | None = None
    """A Snowball stemmer, such as english; none by default."""
    stopwords: str = "en"
    """Language of the stop-words that bm25s leaves out; an empty text keeps all words."""
    k1: float = 1.5
    """Saturation of term frequency."""
    b: float = 0.75
    """Strength of length normalisation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.k1 < math.inf:
            raise OptionError(f"--k1 is {self.k1}; it must be at least 0")
        if not 0 <= self.b <= 1:
            raise OptionError(f"--b is {self.b}; it must be between 0 and 1")
        if self.stopwords and self.stopwords not in STOPWORDS:
            raise OptionError(f"no stop-words of {self.stopwords!r}{nearest(self.stopwords, STOPWORDS)}")

    def made_of(self) -> dict[str, Any]:
        """Return what an index depends on, besides the passages."""
        return dataclasses.asdict(self)


class BM25:
    """A BM25 index over passages.

    Raises:
        InputError: no passage has a word that counts.
    """

    def __init__(self, passages: Iterable[Passage], config: Config | None = None, *, progress: bool = False) -> None:
        self.config = config or Config()
        self.passage_ids: list[str] = []
        self._progress = progress
        tokens = self._tokenize(self._texts(passages))
        if not any(tokens.ids):
            raise InputError("no passage has a word that BM25 counts")
        self._index = bm25s.BM25(k1=self.config.k1, b=self.config.b)
        self._index.index(tokens, show_progress=progress)

    @classmethod
    def load(cls, folder: Path) -> BM25:
        """Open a saved index.

        Raises:
            InputError: this is no index.
        """
        passage_ids, options = read_index_folder(folder)
        index = cls.__new__(cls)
        index.config = Config(**{name: options[name] for name in Config.__dataclass_fields__})
        index.passage_ids = passage_ids
        index._progress = False
        index._index = bm25s.BM25.load(str(folder), show_progress=False)
        return index

    def save(self, folder: Path, options: dict[str, Any]) -> None:
        """Write the index; `options` say what it was made from, and come back from `is_index_of`."""
        with new_index_folder(folder, self.passage_ids, options) as temporary:
            self._index.save(str(temporary), show_progress=False)

    def retrieve(self, queries: Sequence[Query], depth: int) -> Iterator[Ranking]:
        """Yield the best `depth` passages of each query; passages that share no term with it are left out."""
        at_least(1, depth=depth)
        depth = min(depth, len(self.passage_ids))
        for query in queries:
            tokens = self._tokenize([query.text], ids=False)
            # "auto" would sort with JAX where that is installed, which takes most of a GPU's memory for itself
            found, scores = self._index.retrieve(tokens, k=depth, show_progress=False, backend_selection="numpy")
            hits = zip(found[0].tolist(), scores[0].tolist(), strict=True)
            yield Ranking.from_scores(query.id, [(self.passage_ids[i], score) for i, score in hits if score > 0])

    def _texts(self, passages: Iterable[Passage]) -> list[str]:
        texts = []
        for passage in passages:
            self.passage_ids.append(passage.id)
            texts.append(f"{passage.title} {passage.text}")
        return texts

    def _tokenize(self, texts: list[str], *, ids: bool = True) -> Any:
        try:
            stemmer = Stemmer.Stemmer(self.config.stemmer) if self.config.stemmer else None
        except KeyError as error:
            raise OptionError(
                f"unknown stemmer {self.config.stemmer!r}{nearest(str(self.config.stemmer), Stemmer.algorithms())}"
            ) from error
        return bm25s.tokenize(
            texts,
            stopwords=self.config.stopwords or [],
            stemmer=stemmer,
            return_ids=ids,
            show_progress=self._progress and ids,
        )
