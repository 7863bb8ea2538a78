"""Adapters over one base: chosen by request, loaded and dropped while it runs, and never by a path."""

import asyncio
import json
import math
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import pytest

from qpeft.adapters._folder import load_adapter, save_adapter
from qpeft.methods.query_likelihood import Config, build_scorer
from qpeft.server import models
from qpeft.server.settings import Settings
from qpeft.template import load_template
from qpeft.types import Passage, Query
from tiny_adapters import build, with_store
from tiny_server import DOCUMENTS, QUERY, Watched, ready, running, wait_until

BODY = {"query": QUERY, "documents": DOCUMENTS, "raw_scores": True}
NAMES = ("qpeft_a", "qpeft_r", "lora")


def save(folder, kind, lm, seed=0):
    save_adapter(folder, kind, build(kind, lm, trained=True, seed=seed), lm, load_template("qpeft"))


@pytest.fixture(scope="module")
def saved(make_lm, tmp_path_factory):
    """Return a folder with three adapters for the tiny Llama, one for another model, and what is none."""
    folder = tmp_path_factory.mktemp("adapters")
    for name in NAMES:
        save(folder / name, name, make_lm("llama"))
    save(folder / "foreign", "qpeft_a", make_lm("gpt2"))
    (folder / "empty").mkdir()
    (folder / "file").write_text("no folder")
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "adapters")


@pytest.fixture
def lm(make_lm):
    return Watched(make_lm("llama"))


@pytest.fixture
def client(lm, folder):
    with ready(lambda: lm, Settings(port=0, adapters=str(folder))) as client:
        yield client


@pytest.fixture(scope="module")
def offline(make_lm, saved):
    """Return the scores of the documents by model name, each scored alone."""
    lm = make_lm("llama")
    pairs = [(Query("q", QUERY), Passage("p", text)) for text in DOCUMENTS]
    scores = {"tiny-llama": build_scorer(Config(), lm).score(pairs)}
    for name in NAMES:
        scores[f"tiny-llama:{name}"] = build_scorer(Config(adapter=str(saved / name)), lm).score(pairs)
    return scores


def assert_scores(response, wanted):
    assert response.status_code == 200, response.text
    scores = {result["index"]: result["relevance_score"] for result in response.json()["results"]}
    assert [scores[i] for i in range(len(wanted))] == pytest.approx(wanted, abs=1e-4)


def names(client):
    return [card["id"] for card in client.get("/v1/models").json()["data"]]


def test_adapters_that_fit_are_served(client, caplog):
    cards = {card["id"]: card for card in client.get("/v1/models").json()["data"]}
    assert list(cards) == ["tiny-llama", "tiny-llama:lora", "tiny-llama:qpeft_a", "tiny-llama:qpeft_r"]
    assert cards["tiny-llama:lora"]["parent"] == "tiny-llama"
    assert cards["tiny-llama:lora"]["adapter"]["kind"] == "lora"
    assert client.get("/info").json()["adapters_available"] == ["empty", "foreign", "lora", "qpeft_a", "qpeft_r"]


def test_a_mixed_batch_gives_the_offline_scores(client, lm, offline):
    lm.forget()
    lm.close()
    with ThreadPoolExecutor(9) as pool:
        first = pool.submit(client.post, "/v2/rerank", json=BODY)
        lm.wait_for_batch()
        asked = {
            (name, i): pool.submit(client.post, "/v2/rerank", json={**BODY, "model": name})
            for name in offline
            for i in range(2)
        }
        wait_until(lambda: client.app.state.service.batcher.queued == 40)
        lm.open()
        assert_scores(first.result(), offline["tiny-llama"])
        for (name, _), future in asked.items():
            assert future.result().json()["model"] == name
            assert_scores(future.result(), offline[name])
    rows, adapters = lm.batches[1]
    assert (len(rows), len(set(map(id, adapters)))) == (40, 4)
    assert len({round(scores[0], 3) for scores in offline.values()}) == 4


def test_every_dialect_takes_an_adapter(client, offline):
    name = "tiny-llama:qpeft_a"
    wanted = offline[name]
    tei = client.post("/rerank", json={"query": QUERY, "texts": DOCUMENTS, "raw_scores": True, "model": name}).json()
    assert {each["index"]: each["score"] for each in tei} == pytest.approx(dict(enumerate(wanted)), abs=1e-4)
    score = client.post("/score", json={"text_1": QUERY, "text_2": DOCUMENTS, "model": name}).json()
    assert [each["score"] for each in score["data"]] == pytest.approx([math.exp(each) for each in wanted], rel=1e-3)
    batch = client.post("/v1/rerank/batch", json={"queries": [BODY], "raw_scores": True, "model": name}).json()
    found = {each["index"]: each["relevance_score"] for each in batch["rankings"][0]["results"]}
    assert found == pytest.approx(dict(enumerate(wanted)), abs=1e-4)
    explained = client.post("/v1/rerank", json={**BODY, "model": name, "explain": True}).json()["results"]
    for result in explained:
        assert result["explanation"]["hinted_score"] == pytest.approx(result["relevance_score"], abs=1e-4)
        assert result["explanation"]["hinted_rank"] == explained.index(result) + 1


@pytest.mark.parametrize("kind", ["qpeft_r", "lora"])
def test_load_and_drop(client, lm, folder, offline, kind):
    name = f"tiny-llama:{kind}"
    before = sum(parameter.numel() for parameter in lm.model.parameters())
    dropped = client.delete(f"/v1/adapters/{kind}")
    assert (dropped.status_code, dropped.json()) == (200, {"id": name, "object": "model", "deleted": True})
    refused = client.post("/v2/rerank", json={**BODY, "model": name})
    assert (refused.status_code, name in names(client)) == (404, False)
    assert client.delete(f"/v1/adapters/{kind}").status_code == 404
    assert_scores(client.post("/v2/rerank", json=BODY), offline["tiny-llama"])
    freed = before - sum(parameter.numel() for parameter in lm.model.parameters())
    assert (freed > 0) == (kind == "lora")
    loaded = client.post(f"/v1/adapters/{kind}")
    assert (loaded.status_code, loaded.json()["id"]) == (200, name)
    for each, scores in offline.items():
        assert_scores(client.post("/v2/rerank", json={**BODY, "model": each}), scores)
    assert sum(parameter.numel() for parameter in lm.model.parameters()) == before


def test_a_new_adapter_and_a_newer_one_of_its_name(client, make_lm, folder, offline):
    tiny = make_lm("llama")
    for seed in (1, 2):
        save(folder / "fresh", "qpeft_a", tiny, seed)
        assert client.post("/v1/adapters/fresh").status_code == 200
        fresh = build_scorer(Config(adapter=str(folder / "fresh")), tiny)
        wanted = fresh.score([(Query("q", QUERY), Passage("p", text)) for text in DOCUMENTS])
        assert wanted[0] != pytest.approx(offline["tiny-llama:qpeft_a"][0], abs=1e-3)
        assert_scores(client.post("/v2/rerank", json={**BODY, "model": "tiny-llama:fresh"}), wanted)
    assert names(client).count("tiny-llama:fresh") == 1


def test_an_adapter_is_dropped_after_its_last_answer(client, lm, offline):
    lm.forget()
    lm.close()
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(client.post, "/v2/rerank", json={**BODY, "model": "tiny-llama:lora"})
        lm.wait_for_batch()
        waiting = pool.submit(client.post, "/v2/rerank", json={**BODY, "model": "tiny-llama:lora"})
        wait_until(lambda: client.app.state.service.batcher.queued == 5)
        dropping = pool.submit(client.delete, "/v1/adapters/lora")
        wait_until(lambda: "tiny-llama:lora" not in names(client))
        assert not dropping.done()
        lm.open()
        for each in (asked, waiting):
            assert_scores(each.result(), offline["tiny-llama:lora"])
        assert dropping.result().status_code == 200


@pytest.mark.parametrize(
    ("name", "status", "says"),
    [
        ("foreign", 409, "was trained for 'tiny-gpt2'"),
        ("empty", 409, "no adapter in"),
        ("file", 404, "no adapter 'file'"),
        ("qpeft_aa", 404, "did you mean 'qpeft_a'?"),
        ("..", 404, None),
        ("%2e%2e", 404, None),
        ("%2e%2e%2fadapters%2fqpeft_a", 404, None),
        (".", 404, None),
        ("%00", 404, None),
        ("%ff", 404, None),
        ("tiny-lm-qpeft-a", 404, None),
    ],
)
def test_what_cannot_be_loaded(client, name, status, says):
    response = client.post(f"/v1/adapters/{name}")
    assert response.status_code == status, response.text
    if says:
        assert says in response.json()["message"]
    assert len(names(client)) == 4


def test_what_could_not_be_loaded_leaves_nothing_in_the_model(client, lm, folder):
    before = sum(parameter.numel() for parameter in lm.model.parameters())
    shutil.copytree(folder / "lora", folder / "damaged")
    (folder / "damaged" / "adapter_model.safetensors").write_bytes(b"no tensors")
    for _ in range(2):
        refused = client.post("/v1/adapters/damaged")
        assert (refused.status_code, "cannot be read" in refused.json()["message"]) == (409, True)
    assert sum(parameter.numel() for parameter in lm.model.parameters()) == before


def change(folder, **facts):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))


def test_a_damaged_adapter_keeps_no_other_from_being_served(lm, folder, caplog):
    for name, facts in (
        ("limit", {"max_passage_tokens": "many"}),
        ("kind", {"adapter": 5}),
        ("method", {"method": "yes_noo"}),
    ):
        shutil.copytree(folder / "qpeft_a", folder / name)
        change(folder / name, **facts)
    with caplog.at_level("WARNING"), ready(lambda: lm, Settings(port=0, adapters=str(folder))) as client:
        assert {"tiny-llama", *(f"tiny-llama:{name}" for name in NAMES)} <= set(names(client))
        for name in ("limit", "kind", "method"):
            assert client.post(f"/v1/adapters/{name}").status_code == 409
    facts = {record.facts["adapter"]: record.facts["reason"] for record in caplog.records if hasattr(record, "facts")}
    assert "'max_passage_tokens' cannot be 'many'" in facts["limit"]
    assert "'adapter' cannot be 5" in facts["kind"]
    assert "unknown method 'yes_noo'; did you mean 'yes_no'" in facts["method"]


def test_a_fault_in_an_adapter_keeps_no_other_from_being_served(lm, folder, caplog, monkeypatch):
    opened = models.open_adapter

    def fail(path, *others):
        if path.name == "lora":
            raise AttributeError("what nobody thought of")
        return opened(path, *others)

    monkeypatch.setattr(models, "open_adapter", fail)
    with caplog.at_level("WARNING"), ready(lambda: lm, Settings(port=0, adapters=str(folder))) as client:
        assert names(client) == ["tiny-llama", "tiny-llama:qpeft_a", "tiny-llama:qpeft_r"]
    (failed,) = [record for record in caplog.records if getattr(record, "facts", {}).get("adapter") == "lora"]
    assert "what nobody thought of" in failed.facts["reason"]
    assert failed.exc_info


@pytest.mark.parametrize("kind", ["qpeft_a", "lora"])
def test_an_adapter_whose_scores_are_no_numbers_is_not_served(client, lm, make_lm, folder, offline, kind):
    other = make_lm("llama")
    adapter = build(kind, other, trained=True)
    for parameter in adapter.parameters():
        parameter.data.fill_(math.nan)
    shutil.rmtree(folder / kind)
    save_adapter(folder / kind, kind, adapter, other, load_template("qpeft"))
    before = sum(parameter.numel() for parameter in lm.model.parameters())
    refused = client.post(f"/v1/adapters/{kind}")
    assert (refused.status_code, "gave the score nan" in refused.json()["message"]) == (409, True)
    assert sum(parameter.numel() for parameter in lm.model.parameters()) == before
    name = f"tiny-llama:{kind}"  # goes on as it was
    assert_scores(client.post("/v2/rerank", json=BODY | {"model": name}), offline[name])


def test_what_cannot_be_listed_is_said(lm, folder, caplog, monkeypatch):
    listing = Path.iterdir

    def refuse(path):
        if path in closed:
            raise PermissionError(13, "Permission denied")
        return listing(path)

    closed = {folder / "lora"}
    monkeypatch.setattr(Path, "iterdir", refuse)
    monkeypatch.setattr(models, "open_adapter", lambda path, *others: list(path.iterdir()))
    with caplog.at_level("WARNING"), ready(lambda: lm, Settings(port=0, adapters=str(folder))) as client:
        closed.add(folder)
        assert client.get("/info").json()["adapters_available"] == []
        assert client.post("/v1/adapters/lora").status_code == 404
    facts = [record.facts for record in caplog.records if hasattr(record, "facts")]
    assert "Permission denied" in next(each["reason"] for each in facts if each.get("adapter") == "lora")
    assert [each["folder"] for each in facts if "folder" in each] == [str(folder)] * 2


def test_a_server_that_ends_while_it_opens_opens_no_adapters(lm, folder, caplog):
    opening, going_on = threading.Event(), threading.Event()

    def open_lm():
        opening.set()
        assert going_on.wait(20)
        return lm

    with caplog.at_level("INFO"), running(open_lm, Settings(port=0, adapters=str(folder))) as client:
        assert opening.wait(20)
        asyncio.run(client.app.state.service.drain())
        going_on.set()
        assert client.get("/ready").status_code == 503
    assert list(client.app.state.service._models.served) == ["tiny-llama"]
    assert "ready" not in [record.message for record in caplog.records]


def test_links_out_of_the_folder_are_refused(client, saved, folder, tmp_path):
    (folder / "inside").symlink_to(folder / "qpeft_a")
    (folder / "outside").symlink_to(saved / "qpeft_a")
    (folder / "loop").symlink_to(folder / "loop")
    shutil.copytree(folder / "qpeft_a", folder / "mixed")
    (folder / "mixed" / "adapter_model.safetensors").unlink()
    (folder / "mixed" / "adapter_model.safetensors").symlink_to(saved / "qpeft_a" / "adapter_model.safetensors")
    assert client.post("/v1/adapters/inside").status_code == 200
    for name in ("outside", "loop", "mixed"):
        assert client.post(f"/v1/adapters/{name}").status_code == 404


def test_the_embedded_adapters_come_with_the_embedded_model():
    from qpeft.loading import load_lm
    from qpeft.model_config import ModelConfig

    with ready(lambda: load_lm(ModelConfig(dtype="float32"))) as client:
        assert names(client) == ["tiny-lm", "tiny-lm:tiny-lm-qpeft-a", "tiny-lm:tiny-lm-qpeft-r"]
        bodies = [{**BODY, "model": name} for name in names(client)]
        scores = [client.post("/v2/rerank", json=body).json()["results"][0]["relevance_score"] for body in bodies]
        assert len(set(scores)) == 3


def test_an_encoder_decoder_is_served_alone(t5, saved):
    with ready(lambda: t5, Settings(port=0, adapters=str(saved))) as client:
        assert names(client) == ["tiny-t5"]
        scorer = build_scorer(Config(), t5)
        wanted = scorer.score([(Query("q", QUERY), Passage("p", text)) for text in DOCUMENTS])
        assert_scores(client.post("/v2/rerank", json=BODY), wanted)
        assert client.post("/v1/adapters/qpeft_a").status_code == 409


def test_a_folder_of_a_model_is_served_by_its_last_name(saved_model):
    from qpeft.loading import load_lm
    from qpeft.model_config import ModelConfig

    with ready(lambda: load_lm(ModelConfig(str(saved_model), dtype="float32"))) as client:
        assert names(client) == [saved_model.name]
        assert str(saved_model.parent) not in client.get("/info").text


def test_an_adapter_of_the_same_folder_scores_as_offline(lm, saved, offline):
    """The scores that are compared here differ between adapters by more than the tolerance."""
    opened = load_adapter(saved / "qpeft_a", lm)
    assert opened.name == "qpeft_a"
    assert abs(offline["tiny-llama"][0] - offline["tiny-llama:qpeft_a"][0]) > 1e-3


def test_names_that_are_hidden_or_no_line_are_none_of_an_adapter(client, folder):
    before = client.get("/info").json()["adapters_available"]
    for name in (".hidden", "two\nlines"):
        shutil.copytree(folder / "qpeft_a", folder / name)
        assert client.post(f"/v1/adapters/{quote(name)}").status_code == 404
    assert client.get("/info").json()["adapters_available"] == before


def test_contexts_are_encoded_with_padding_only_where_they_go_to_disk(make_lm, tmp_path):
    """Whoever resumes needs the same bits, and nobody resumes a request."""
    served = {}
    for folder in (None, tmp_path):
        lm = with_store(make_lm("llama"))
        lm.store.folder = folder
        served[folder] = models.Models(lm, Settings()).lm.repeatable
    assert served == {None: False, tmp_path: True}
