"""Adapters of all methods over one base, in one batch queue."""

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from qpeft import methods
from qpeft.adapters import lora
from qpeft.adapters._folder import save_adapter
from qpeft.lm.causal import CausalLM
from qpeft.lm.read_out import Head
from qpeft.server.batcher import Chunk, Job, score_chunks
from qpeft.server.settings import Settings
from qpeft.template import load_template
from qpeft.types import Passage, Query
from tiny_adapters import build
from tiny_server import DOCUMENTS, QUERY, ready

TEMPLATES = {"query_likelihood": "plain", "classifier": "rankllama", "yes_no": "yes_no"}
PAIRS = [(Query("q", QUERY), Passage("p", text)) for text in DOCUMENTS]


@pytest.fixture(scope="module")
def folder(make_lm, tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    for seed, method in enumerate(TEMPLATES):
        lm = make_lm("llama")
        torch.manual_seed(seed)
        adapter = lora.build(lora.Config(r=2), lm)
        if method == "classifier":
            adapter.add_head(lm)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.2)
        own = {"yes": "yes", "no": "no"} if method == "yes_no" else {}
        template = load_template(TEMPLATES[method])
        save_adapter(root / method, "lora", adapter, lm, template, method=method, method_options=own)
    lm = make_lm("llama")
    for name in ("soft_prompt", "qpeft_a"):
        save_adapter(root / name, name, build(name, lm, trained=True), lm, load_template("yes_no"), method="yes_no")
    return root


@pytest.fixture(scope="module")
def client(make_lm, folder):
    with ready(lambda: make_lm("llama"), Settings(port=0, adapters=str(folder), max_wait_ms=50)) as client:
        yield client


@pytest.fixture(scope="module")
def offline(make_lm, folder):
    lm = make_lm("llama")
    return {path.name: methods.open_scorer(lm, path).score(PAIRS) for path in folder.iterdir()}


def ask(client, name, **more):
    body = {"model": f"tiny-llama:{name}", "query": QUERY, "documents": DOCUMENTS, **more}
    return client.post("/v1/rerank", json=body)


def scores(response):
    assert response.status_code == 200, response.text
    found = {result["index"]: result["relevance_score"] for result in response.json()["results"]}
    return [found[i] for i in range(len(DOCUMENTS))]


def test_each_scores_as_offline_also_all_at_once(client, offline):
    with ThreadPoolExecutor(8) as pool:
        names = [*offline] * 3
        found = list(pool.map(lambda name: scores(ask(client, name, raw_scores=True)), names))
    for name, own in zip(names, found, strict=True):
        assert own == pytest.approx(offline[name], abs=1e-4)
    assert len({round(own[0], 3) for own in found}) == len(offline)


def test_scorers_of_one_kind_share_a_call_of_the_model(make_lm, folder, offline, monkeypatch):
    lm = make_lm("llama")
    names = sorted(offline)
    jobs = [Job(methods.open_scorer(lm, folder / name), PAIRS, None, None, 0.0) for name in names]
    calls = []
    for name in ("log_probs", "read"):
        own = getattr(lm, name)
        monkeypatch.setattr(lm, name, lambda rows, *a, own=own, **o: calls.append(len(rows)) or own(rows, *a, **o))
    outcomes = score_chunks([Chunk(job, PAIRS) for job in jobs])
    for name, outcome in zip(names, outcomes, strict=True):
        assert outcome.scores == pytest.approx(offline[name], abs=1e-4)
    assert sorted(calls) == [len(PAIRS), len(PAIRS), 3 * len(PAIRS)], "likelihoods, one head, three that answer"


def test_probabilities(client, offline):
    for name, raw in offline.items():
        logistic = [1 / (1 + math.exp(-score)) for score in raw]
        wanted = [math.exp(score) for score in raw] if name == "query_likelihood" else logistic
        assert scores(ask(client, name)) == pytest.approx(wanted, abs=1e-4)


def test_reasons_are_for_query_likelihood(client):
    assert ask(client, "query_likelihood", explain=True).status_code == 200
    for name in ("classifier", "yes_no"):
        response = ask(client, name, explain=True)
        assert response.status_code == 422
        assert f"scores by the method {name}, which gives no reasons" in response.json()["message"]


def test_cards_say_the_method(client):
    cards = {card["id"]: card["method"] for card in client.get("/v1/models").json()["data"]}
    assert cards["tiny-llama"] == cards["tiny-llama:query_likelihood"] == "query_likelihood"
    assert cards["tiny-llama:classifier"] == "classifier"
    assert cards["tiny-llama:soft_prompt"] == "yes_no"


def test_a_model_that_was_saved_as_a_classifier(make_lm):
    lm = make_lm("llama")
    module = torch.nn.Linear(32, 1, bias=False).requires_grad_(False)
    lm = CausalLM(
        lm.model, lm.tokenizer, name="ranker", max_length=128, batch_tokens=512, head=Head(module), has_words=False
    )
    expected = methods.load("classifier").build_scorer(methods.load("classifier").Config(), lm).score(PAIRS)
    with ready(lambda: lm) as client:
        body = {"query": QUERY, "documents": DOCUMENTS, "raw_scores": True}
        assert scores(client.post("/v1/rerank", json=body)) == pytest.approx(expected, abs=1e-4)
        assert client.get("/v1/models").json()["data"][0]["method"] == "classifier"
