import os
from pathlib import Path

import pytest
from cats import PASSAGES

import qpeft
from qpeft.data.beir import BeirCollection
from qpeft.data.collection import open_collection
from qpeft.data.irds import IrdsCollection
from qpeft.errors import InputError


def test_a_folder(beir):
    collection = open_collection(str(beir.folder))
    assert isinstance(collection, BeirCollection)
    assert tuple(collection.passages.values()) == PASSAGES


def test_a_dataset_of_ir_datasets():
    collection = open_collection("ir_datasets:beir/scifact")
    assert isinstance(collection, IrdsCollection)
    assert collection.splits() == ["test", "train"]


@pytest.mark.parametrize("name", ["miny", "none/such", "ir_datasets", "a file"])
def test_anything_else(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a file").write_text("")
    with pytest.raises(InputError, match="neither a folder, nor 'mini', nor 'ir_datasets:<id>'"):
        open_collection(name)


def test_a_folder_that_is_no_collection(tmp_path):
    with pytest.raises(InputError, match=r"no corpus\.jsonl"):
        open_collection(str(tmp_path))


def test_mini(tmp_path, monkeypatch, beir):
    if not (Path(qpeft.__path__[0]) / "collections" / "mini" / "corpus.jsonl").exists():
        pytest.skip("mini is not built yet")
    # A folder of that name does not stand in its way.
    monkeypatch.chdir(tmp_path)
    os.rename(beir.folder, tmp_path / "mini")
    assert open_collection("mini").name == "mini"
    assert len(open_collection("mini").passages) > len(PASSAGES)
    assert tuple(open_collection("./mini").passages.values()) == PASSAGES
