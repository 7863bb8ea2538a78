"""What every reader of a file promises, whatever the format."""

import gzip
import json

import pytest
from cats import jsonl

from qpeft.data.dpr import read_dpr_training, read_evidence, read_retrieved, retrieved_ids
from qpeft.data.jsonl import read_groups, read_requests
from qpeft.data.passages import read_passages
from qpeft.data.squad import read_squad
from qpeft.data.store import PassageStore
from qpeft.data.trec import read_qrels, read_run
from qpeft.errors import FormatError, InputError

REQUEST = {"query": {"qid": 1, "text": "é"}, "candidates": [{"docid": "d", "doc": "é", "score": 1}]}
QUESTION = {"question": "é", "ctxs": [{"id": 1, "text": "é"}], "positive_ctxs": [{"text": "é"}]}
HUGE, DEEP = '{"a": ' + "9" * 5000 + "}", "[" * 3000 + "]" * 3000
LINES = {
    "run": (lambda path: dict(read_run(path)), "é Q0 d 1 1.0 t\nq Q0 d 1 1.0 t\n"),
    "qrels": (read_qrels, "é 0 d 1\nq 0 d 1\n"),
    "passages": (read_passages, jsonl({"_id": "é", "text": "é"}, {"_id": "b", "text": "y"})),
    "store": (lambda path: dict(PassageStore(path)), jsonl({"_id": "é", "text": "é"}, {"_id": "b", "text": "y"})),
    "groups": (read_groups, jsonl({"query": "é", "pos": ["é"]}, {"query": "b", "pos": ["y"]})),
    "requests": (lambda path: list(read_requests(path)), jsonl(REQUEST, REQUEST)),
}
WHOLE = {
    "squad": (read_squad, json.dumps({"data": [{"paragraphs": [{"context": "é", "qas": []}]}]}, ensure_ascii=False)),
    "retrieved": (read_retrieved, json.dumps([QUESTION], ensure_ascii=False)),
    "retrieved ids": (retrieved_ids, json.dumps([QUESTION], ensure_ascii=False)),
    "training": (read_dpr_training, json.dumps([QUESTION], ensure_ascii=False)),
    "evidence": (lambda path: list(read_evidence(path)), "id\ttext\ttitle\n1\té\té\n"),
}


@pytest.fixture(params=LINES | WHOLE)
def read_and_content(request):
    return (LINES | WHOLE)[request.param]


@pytest.fixture(params=LINES)
def read_lines_and_content(request):
    return LINES[request.param]


def put(folder, content, name="file"):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_gzip_reads_the_same(tmp_path, read_and_content):
    read, content = read_and_content
    plain = read(put(tmp_path, content))
    assert plain
    assert read(put(tmp_path, gzip.compress(content.encode()), "file.gz")) == plain


def test_missing_file(tmp_path, read_and_content):
    read, _ = read_and_content
    with pytest.raises(InputError, match="none: No such file"):
        read(tmp_path / "none")


def test_a_folder_is_no_file(tmp_path, read_and_content):
    read, _ = read_and_content
    with pytest.raises(InputError, match="Is a directory"):
        read(tmp_path)


def test_gzip_cut_short(tmp_path, read_and_content):
    read, content = read_and_content
    with pytest.raises(FormatError, match=r"file\.gz: damaged gzip"):
        read(put(tmp_path, gzip.compress(content.encode())[:-9], "file.gz"))


def test_not_utf8(tmp_path, read_and_content):
    read, content = read_and_content
    with pytest.raises(FormatError, match=r"file.*(UTF-8|utf-8)"):
        read(put(tmp_path, content.replace("\\u00e9", "é").encode("latin-1")))


def test_byte_order_mark(tmp_path, read_and_content):
    read, content = read_and_content
    assert read(put(tmp_path, b"\xef\xbb\xbf" + content.encode())) == read(put(tmp_path, content, "bare"))


def test_blank_lines_and_line_ends(tmp_path, read_lines_and_content):
    read, content = read_lines_and_content
    expected = read(put(tmp_path, content, "bare"))
    assert read(put(tmp_path, "\n  \n" + content.replace("\n", "\r\n\n") + " ")) == expected
    assert read(put(tmp_path, content.rstrip("\n"), "no end")) == expected


@pytest.mark.parametrize("bad", ["{", "oops", "\x00", "[]", '{"query": {}}', HUGE, DEEP])
def test_malformed_line_is_named(tmp_path, read_lines_and_content, bad):
    read, content = read_lines_and_content
    path = put(tmp_path, f"{content}\n{bad}\n")
    with pytest.raises(FormatError, match=f"{path}:4: ") as caught:
        read(path)
    assert (caught.value.path, caught.value.line) == (str(path), 4)
