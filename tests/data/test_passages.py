import gzip
import os
import pickle
import shutil
import sys
import threading
import zlib
from pathlib import Path

import pytest
from cats import jsonl

from qpeft.data import store
from qpeft.data.passages import read_passages
from qpeft.data.store import PassageStore, open_passages
from qpeft.errors import FormatError, InputError
from qpeft.types import Passage

CORPUS = (
    '{"_id": "b", "title": "Bé", "text": "first, 二"}\n'
    "\n"
    '{"id": 7, "title": null, "contents": "second"}\r\n'
    '{"docid": "a", "text": "", "metadata": {"year": 1999}}'
)
PASSAGES = [Passage("b", "first, 二", "Bé"), Passage("7", "second"), Passage("a", "")]

READERS = {"memory": read_passages, "store": PassageStore}


@pytest.fixture(params=READERS)
def reader(request):
    return READERS[request.param]


def write(folder, content, name="corpus.jsonl"):
    path = folder / name
    data = content.encode()
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return path


@pytest.mark.parametrize("name", ["corpus.jsonl", "corpus.jsonl.gz"])
def test_a_mapping_in_file_order(tmp_path, reader, name):
    passages = reader(write(tmp_path, CORPUS, name))
    assert len(passages) == 3
    assert list(passages) == ["b", "7", "a"]
    assert list(passages.values()) == PASSAGES
    assert list(passages.items()) == [(passage.id, passage) for passage in PASSAGES]
    assert [passages[passage.id] for passage in reversed(PASSAGES)] == PASSAGES[::-1]
    assert "7" in passages
    assert passages.get("none") is None
    with pytest.raises(KeyError):
        passages["none"]


def test_empty_corpus(tmp_path, reader):
    passages = reader(write(tmp_path, ""))
    assert dict(passages) == {}
    assert "a" not in passages


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ('{"_id": "\\ud83d", "text": "x"}', "the id '.ud83d' has half a character"),
        ("[1]", "not a JSON object"),
        ('{"text": "x"}', "no '_id' or 'id'"),
        ('{"_id": "x"}', "no 'text' or 'contents'"),
        ('{"_id": "", "text": "x"}', "the id is ''"),
        ('{"_id": 1.5, "text": "x"}', "the id is 1.5"),
        ('{"_id": true, "text": "x"}', "the id is True"),
        ('{"_id": "x", "text": 3}', "'text' is 3"),
        ('{"_id": "x", "text": "y", "title": []}', "'title' is \\[\\]"),
        ('{"_id": "b", "text": "again"}', "passage 'b' occurs twice"),
    ],
)
@pytest.mark.parametrize("name", ["corpus.jsonl", "corpus.jsonl.gz"])
def test_malformed_lines(tmp_path, reader, line, message, name):
    path = write(tmp_path, f"{CORPUS}\n\n{line}\n", name)
    with pytest.raises(FormatError, match=message) as caught:
        reader(path)
    assert (caught.value.path, caught.value.line) == (str(path), 6)
    assert not list(store.cache_folder(path).glob("*.npy"))


def test_missing_corpus(tmp_path, reader):
    with pytest.raises(InputError, match=r"none\.jsonl: No such file"):
        reader(tmp_path / "none.jsonl")


def test_ids_with_one_hash_are_told_apart(tmp_path):
    pair = ["plumless", "buckeroo"]
    assert zlib.crc32(b"plumless") == zlib.crc32(b"buckeroo")
    ids = ["x", *pair, "y"]
    passages = PassageStore(write(tmp_path, jsonl(*({"_id": i, "text": f"text of {i}"} for i in ids))))
    assert [passages[i].text for i in ids] == [f"text of {i}" for i in ids]
    # One of the pair alone must not answer for the other.
    alone = PassageStore(write(tmp_path, jsonl({"_id": pair[0], "text": ""}), "alone.jsonl"))
    assert pair[1] not in alone
    with pytest.raises(FormatError, match=f"{pair[1]!r} occurs twice") as caught:
        PassageStore(write(tmp_path, jsonl(*({"_id": i, "text": ""} for i in [*pair, pair[1]])), "twice.jsonl"))
    assert caught.value.line == 3


def test_the_index_is_kept_and_renewed(tmp_path):
    path = write(tmp_path, CORPUS)
    PassageStore(path)
    (index,) = store.cache_folder(path).iterdir()
    made = index.stat().st_mtime_ns
    assert len(PassageStore(path)) == 3
    assert index.stat().st_mtime_ns == made
    # Same size, other time: must be seen.
    path.write_text(CORPUS.replace('"b"', '"c"'))
    os.utime(path, ns=(1, 1))
    assert list(PassageStore(path)) == ["c", "7", "a"]
    assert PassageStore(path)["c"].title == "Bé"
    assert index.stat().st_mtime_ns != made


@pytest.mark.parametrize("damage", [b"", b"rubbish", None])
def test_a_damaged_index_is_made_again(tmp_path, damage):
    path = write(tmp_path, CORPUS)
    PassageStore(path)
    (index,) = store.cache_folder(path).iterdir()
    index.write_bytes(index.read_bytes()[:-1] if damage is None else damage)
    assert list(PassageStore(path).values()) == PASSAGES


def test_a_gzip_corpus_is_unpacked_again_when_it_changes_or_the_copy_is_gone(tmp_path):
    path = write(tmp_path, CORPUS, "corpus.jsonl.gz")
    PassageStore(path)
    plain = store.cache_folder(path) / "corpus.jsonl"
    assert plain.read_text() == CORPUS.replace("\r\n", "\n")
    plain.unlink()
    assert PassageStore(path)["7"].text == "second"
    write(tmp_path, '{"_id": "new", "text": ""}', "corpus.jsonl.gz")
    assert list(PassageStore(path)) == ["new"]


def test_an_open_store_notices_that_the_file_was_rewritten(tmp_path):
    path = write(tmp_path, CORPUS)
    passages = PassageStore(path)
    path.write_text("x" * 10)
    with pytest.raises(FormatError, match="has changed since it was opened"):
        passages["a"]


def test_where_the_index_goes(tmp_path, monkeypatch):
    path = write(tmp_path, CORPUS)
    assert store.cache_folder(path).parent == Path(os.environ["QPEFT_CACHE"])
    monkeypatch.delenv("QPEFT_CACHE")
    PassageStore(path)
    assert [file.name for file in (tmp_path / ".qpeft").iterdir()] == ["corpus.jsonl.index-1.npy"]


def test_a_folder_that_cannot_be_written_is_left_alone(monkeypatch, tmp_path):
    monkeypatch.delenv("QPEFT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    # /proc cannot be written even by root.
    assert store.cache_folder(Path("/proc/version")).parent == tmp_path / "qpeft"


def test_a_moved_folder_keeps_its_index(tmp_path, monkeypatch):
    monkeypatch.delenv("QPEFT_CACHE")
    (tmp_path / "a").mkdir()
    PassageStore(write(tmp_path / "a", CORPUS))
    shutil.move(tmp_path / "a", tmp_path / "b")
    index = tmp_path / "b" / ".qpeft" / "corpus.jsonl.index-1.npy"
    made = index.stat().st_mtime_ns
    assert PassageStore(tmp_path / "b" / "corpus.jsonl")["7"].text == "second"
    assert index.stat().st_mtime_ns == made


def test_pickling_opens_it_anew(tmp_path):
    passages = PassageStore(write(tmp_path, CORPUS))
    assert list(pickle.loads(pickle.dumps(passages)).values()) == PASSAGES


def test_threads_share_a_store(tmp_path):
    interval = sys.getswitchinterval()
    texts = {str(i): "word " * (i % 97) for i in range(500)}
    passages = PassageStore(write(tmp_path, jsonl(*({"_id": i, "text": text} for i, text in texts.items()))))
    wrong: list[str] = []

    def fetch(start: int) -> None:
        for i in range(start, start + 2000):
            key = str(i * 31 % 500)
            if passages[key].text != texts[key]:
                wrong.append(key)

    threads = [threading.Thread(target=fetch, args=(start,)) for start in range(4)]
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert wrong == []


def test_small_corpora_stay_in_memory_and_leave_no_files(tmp_path):
    path = write(tmp_path, CORPUS)
    assert isinstance(open_passages(path), dict)
    assert os.listdir(store.cache_folder(path)) == []
    large = write(tmp_path, jsonl(*({"_id": i, "text": "x" * 2**20} for i in range(17))), "large.jsonl")
    passages = open_passages(large)
    assert isinstance(passages, PassageStore)
    assert (len(passages), len(passages["16"].text)) == (17, 2**20)


@pytest.mark.collections
def test_store_and_memory_agree_on_a_real_corpus(shared):
    path = shared("squad") / "corpus.jsonl"
    assert dict(PassageStore(path)) == read_passages(path)


def test_a_corpus_that_is_written_while_it_is_indexed(tmp_path, monkeypatch):
    path, build = write(tmp_path, CORPUS), store._build_index

    def build_late(*arguments):
        build(*arguments)
        path.write_text(CORPUS + "\n")

    monkeypatch.setattr(store, "_build_index", build_late)
    with pytest.raises(InputError, match=r"corpus\.jsonl: changed while it was being indexed"):
        PassageStore(path)
