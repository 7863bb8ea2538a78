"""The page's files, its examples, and BM25, without a browser."""

import re

import pytest

from qpeft.data.collection import open_collection
from qpeft.retrieval.bm25 import BM25
from qpeft.server import page
from qpeft.server.ranking import MAX_EXPLAINED
from qpeft.server.settings import Settings
from qpeft.types import Passage, Query
from tiny_server import ready

KEY = "sesame-open"


@pytest.fixture(scope="module")
def locked(lm):
    with ready(lambda: lm, Settings(port=0, max_wait_ms=0, max_documents=8), keys=[KEY]) as client:
        yield client


def bm25(client, query, *texts):
    body = {"query": query, "documents": [{"text": text} for text in texts]}
    return client.post("/page/bm25", json=body, headers={"Authorization": f"Bearer {KEY}"})


def test_nothing_but_the_page_and_the_examples_is_open(locked):
    for path in sorted(page.OPEN - {"/page/candidates"}):
        assert locked.get(path).status_code == 200, path
    assert locked.get("/page/candidates", params={"question": "a001"}).status_code == 200
    for path in ("/page/nothing", "/page/", "/page/web/index.html", "/page/..%2Fapp.py"):
        assert locked.get(path).status_code == 401, path
    assert locked.post("/page/bm25", json={"query": "a", "documents": [{"text": "a"}]}).status_code == 401
    assert locked.get("/page/nothing", headers={"Authorization": f"Bearer {KEY}"}).status_code == 404


def test_the_page_runs_nothing_but_its_own_files(locked):
    for path in ("/", *(f"/page/{name}" for name in page.FILES)):
        headers = locked.get(path).headers
        policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
        assert policy["default-src"] == "'none'"
        assert {policy[kind] for kind in ("script-src", "style-src", "connect-src", "img-src")} == {"'self'"}
        assert {policy[kind] for kind in ("frame-ancestors", "base-uri", "form-action")} == {"'none'"}
        assert headers["x-content-type-options"] == "nosniff"
    assert locked.get("/").headers["content-type"] == "text/html; charset=utf-8"
    assert locked.get("/page/page.js").headers["content-type"] == "text/javascript; charset=utf-8"
    html = locked.get("/").text
    assert not re.search(r"<script(?![^>]* src=)|<style|\sstyle=|\son\w+=", html)
    for name in re.findall(r'(?:src|href)="page/([^"]+)"', html):
        assert name in page.FILES
    for name, (content, _) in page.FILES.items():
        text = content.decode().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|//cdn", text), name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", text), name
        for imported in re.findall(r'from "\./([^"]+)"', text):
            assert imported in page.FILES


def test_what_the_page_and_the_server_must_agree_on():
    script = page.FILES["ranking.js"][0].decode()
    assert f"MAX_EXPLAINED = {MAX_EXPLAINED};" in script


def test_examples_are_those_of_the_collection(locked):
    answer = locked.get("/page/questions").json()
    mini = open_collection("mini")
    queries = {query.id: query.text for split in mini.splits() for query in mini.queries(split).values()}
    assert {each["id"]: each["text"] for each in answer["questions"]} == queries
    assert answer["collection"] == "mini"
    found = locked.get("/page/candidates", params={"question": "a002", "depth": 7}).json()["documents"]
    (ranking,) = BM25(mini.passages.values()).retrieve([Query("a002", queries["a002"])], 7)
    assert [each["text"] for each in found] == [mini.passages[hit.passage_id].text for hit in ranking.hits]
    judged = next(mini.qrels(split)["a002"] for split in mini.splits() if "a002" in mini.qrels(split))
    assert [each["grade"] for each in found] == [judged.get(hit.passage_id, 0) for hit in ranking.hits]
    assert max(each["grade"] for each in found) > 0


@pytest.mark.parametrize(("query", "status"), [("question=zzzz", 404), ("", 422), ("question=a002&depth=0", 422)])
def test_examples_that_are_not_there(locked, query, status):
    refused = locked.get(f"/page/candidates?{query}")
    assert refused.status_code == status
    assert refused.json()["error"]["message"]


def test_bm25_of_the_passages_given(locked):
    texts = ("the sea is salty", "the sky is blue, the sky above", "a blue cat", "the moon")
    results = bm25(locked, "blue sky", *texts).json()["results"]
    passages = [Passage(str(index), text) for index, text in enumerate(texts)]
    (expected,) = BM25(passages).retrieve([Query("q", "blue sky")], 4)
    scored = {int(hit.passage_id): hit.score for hit in expected.hits}
    assert results[:2] == [{"index": 1, "score": scored[1]}, {"index": 2, "score": scored[2]}]
    assert results[2:] == [{"index": 0, "score": 0.0}, {"index": 3, "score": 0.0}], "in the order given"


@pytest.mark.parametrize("texts", [("the of and", "of"), ("", "…", "!")])
def test_bm25_where_no_passage_has_a_word(locked, texts):
    results = bm25(locked, "why", *texts).json()["results"]
    assert results == [{"index": index, "score": 0.0} for index in range(len(texts))]


def test_bm25_has_the_servers_limits(locked):
    refused = bm25(locked, "why", *["a"] * 9)
    assert (refused.status_code, refused.json()["error"]["message"]) == (413, "9 documents; at most 8 are allowed")
    assert bm25(locked, "why").status_code == 422
    headers = {"Authorization": f"Bearer {KEY}"}
    refused = locked.post("/page/bm25", json={"query": "why", "documents": [{"title": "t"}]}, headers=headers)
    assert (refused.status_code, refused.json()["error"]["param"]) == (422, "documents.0.text")
