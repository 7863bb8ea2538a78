from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from cats import PASSAGES, QRELS, QUERIES

from qpeft.data.beir import BeirCollection, write_beir

SHARED = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture(autouse=True)
def _cache_in_tmp(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QPEFT_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def beir(tmp_path: Path) -> BeirCollection:
    write_beir(tmp_path / "cats", PASSAGES, QUERIES, QRELS)
    return BeirCollection(tmp_path / "cats")


@pytest.fixture
def shared() -> Callable[[str], Path]:
    def folder(name: str) -> Path:
        if not (SHARED / name).is_dir():
            pytest.skip(f"{name} is not here")
        return SHARED / name

    return folder
