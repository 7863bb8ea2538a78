import logging
import uuid
from types import SimpleNamespace
from typing import NamedTuple

import ir_datasets
import pytest
from ir_datasets.datasets.base import Dataset
from ir_datasets.formats import TrecQrels, TsvDocs, TsvQueries
from ir_datasets.util import LocalDownload

from qpeft.data.irds import IrdsCollection, _query
from qpeft.errors import InputError, OptionError
from qpeft.types import Passage, Query


class TitledDoc(NamedTuple):
    doc_id: str
    title: str
    text: str

    def default_text(self):
        return f"{self.title} {self.text}"


class PageDoc(NamedTuple):
    doc_id: str
    url: str
    body: str

    def default_text(self):
        return self.body


class TopicQuery(NamedTuple):
    query_id: str
    topic: str

    def default_text(self):
        return self.topic


DOCS = {TitledDoc: "d1\tCats\tThe cat sat.\nd2\t\tThe dog lay.\n", PageDoc: "d1\thttp://x\tThe cat sat.\nd2\t\tDog.\n"}


@pytest.fixture
def register(tmp_path):
    """Register a dataset made of local files, below a name that no other test has."""
    family = f"local-{uuid.uuid4().hex}"
    names = []

    def local(name, content):
        path = tmp_path / name
        path.write_text(content)
        return LocalDownload(path)

    def add(name="", doc_cls=TitledDoc, queries=None, qrels=None, query_cls=ir_datasets.formats.GenericQuery):
        parts = [TsvDocs(local(f"{doc_cls.__name__}.tsv", DOCS[doc_cls]), doc_cls=doc_cls)]
        if queries is not None:
            parts.append(TsvQueries(local(f"{len(names)}.queries", queries), query_cls=query_cls))
            parts.append(TrecQrels(local(f"{len(names)}.qrels", qrels), {}))
        names.append(family + name)
        ir_datasets.registry.register(names[-1], Dataset(*parts))
        return family

    yield add
    for name in names:
        del ir_datasets.registry._registered[name]


QUERIES, QRELS = "q2\twhere?\nq1\twho?\nq3\tunjudged\n", "q1 0 d2 1\nq2 0 d1 2\nq2 1 d1 0\nq9 0 d1 1\n"


def test_splits_are_the_datasets_below(register):
    family = register()
    register("/train", queries="t\ttrain?\n", qrels="t 0 d1 1\n")
    register("/test", queries=QUERIES, qrels=QRELS)
    register("/docs-only")
    collection = IrdsCollection(family)
    assert collection.name == f"ir_datasets:{family}"
    assert collection.splits() == ["test", "train"]
    assert collection.queries("train") == {"t": Query("t", "train?")}
    # Judged ones only, in the order of the queries.
    assert list(collection.queries("test").values()) == [Query("q2", "where?"), Query("q1", "who?")]
    # Of two grades the higher.
    assert collection.qrels("test") == {"q1": {"d2": 1}, "q2": {"d1": 2}, "q9": {"d1": 1}}
    with pytest.raises(OptionError, match="has no split 'dev'; it has test, train"):
        collection.queries("dev")


def test_passages(register):
    passages = IrdsCollection(register()).passages
    expected = [Passage("d1", "The cat sat.", "Cats"), Passage("d2", "The dog lay.")]
    assert list(passages.values()) == expected
    assert [passages["d2"], passages["d1"]] == expected[::-1]
    assert len(passages) == 2
    assert "d3" not in passages
    assert passages.get("d3") is None


def test_documents_without_a_text_field(register):
    passages = IrdsCollection(register(doc_cls=PageDoc)).passages
    assert passages["d1"] == Passage("d1", "The cat sat.")


def test_queries_without_a_text_field(register):
    family = register(queries="q1\tcats\n", qrels="q1 0 d1 1\n", query_cls=TopicQuery)
    assert IrdsCollection(family).queries("test") == {"q1": Query("q1", "cats")}


def test_a_dataset_that_is_itself_a_split(register):
    family = register()
    register("/train/small", queries=QUERIES, qrels=QRELS)
    collection = IrdsCollection(f"{family}/train/small")
    assert collection.splits() == ["train"]
    assert list(collection.queries("train")) == ["q2", "q1"]
    with pytest.raises(OptionError, match="it has train"):
        collection.queries("test")
    assert IrdsCollection(family).splits() == ["train/small"]
    register("/train/dev", queries=QUERIES, qrels=QRELS)
    assert IrdsCollection(f"{family}/train/dev").splits() == ["dev"]


def test_a_split_below_goes_before_the_datasets_own(register):
    family = register(queries="own\tmine?\n", qrels="own 0 d1 1\n")
    register("/test", queries=QUERIES, qrels=QRELS)
    assert list(IrdsCollection(family).queries("test")) == ["q2", "q1"]


def test_answers_of_queries():
    query = ir_datasets.formats.GenericQuery("q", "who?")
    assert _query(query) == Query("q", "who?")
    assert _query(SimpleNamespace(query_id="q", text="who?", answers=["me", "I"])) == Query("q", "who?", ("me", "I"))


def test_fingerprint_follows_the_content(register):
    family = register(queries=QUERIES, qrels=QRELS)
    first = IrdsCollection(family).fingerprint()
    assert IrdsCollection(family).fingerprint() == first
    register("/x", queries=QUERIES, qrels=QRELS.replace("d2 1", "d2 2"))
    assert IrdsCollection(f"{family}/x").fingerprint() != first


def test_unknown_ids_get_the_nearest():
    with pytest.raises(InputError, match=r"no dataset 'beir/scifct/test'; did you mean 'beir/scifact/test'\?"):
        IrdsCollection("beir/scifct/test")
    with pytest.raises(InputError, match=r"no dataset 'antiqe'; did you mean 'antique'\?"):
        IrdsCollection("antiqe")


def test_files_that_are_not_there_are_reported(register, tmp_path):
    family = register(queries=QUERIES, qrels=QRELS)
    for path in tmp_path.iterdir():
        path.unlink()
    collection = IrdsCollection(family)
    for read in (
        lambda: collection.qrels("test"),
        lambda: collection.passages["d1"],
        lambda: list(collection.passages),
    ):
        with pytest.raises(InputError, match=f"ir_datasets:{family}: ir_datasets could not read or download"):
            read()


def test_a_split_that_is_not_there_does_not_keep_one_from_another(register, tmp_path):
    family = register()
    register("/test", queries=QUERIES, qrels=QRELS)
    register("/train", queries=QUERIES, qrels=QRELS)
    whole = IrdsCollection(family).fingerprint()
    for path in tmp_path.glob("2.*"):
        path.unlink()
    collection = IrdsCollection(family)
    assert collection.splits() == ["test", "train"]
    assert collection.queries("test")
    with pytest.raises(InputError, match="could not read"):
        collection.queries("train")
    assert collection.fingerprint() == IrdsCollection(family).fingerprint() != whole


@pytest.fixture
def quiet():
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.usefixtures("quiet")
def test_no_network_is_reported(monkeypatch, tmp_path):
    # A proxy where nobody listens: the same with and without a network.
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("IR_DATASETS_DL_TRIES", "1")
    monkeypatch.setenv("IR_DATASETS_HOME", str(tmp_path))
    with pytest.raises(InputError, match="ir_datasets:vaswani: ir_datasets could not read or download its files: "):
        IrdsCollection("vaswani").qrels("test")
