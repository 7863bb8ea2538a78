"""Calibrations in the server: whose they are, and that they see all documents of a query."""

import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from qpeft import methods
from qpeft.adapters import soft_prompt
from qpeft.adapters._folder import load_adapter, save_adapter
from qpeft.errors import AdapterError, InputError
from qpeft.evaluation.calibration import Platt
from qpeft.evaluation.calibration_file import Calibration, ScoreOrigin, write_calibration
from qpeft.methods import query_likelihood
from qpeft.server.models import Models
from qpeft.server.settings import Settings
from qpeft.template import load_template
from tiny_server import DOCUMENTS, QUERY, ready

CURVE = Platt(2.0, -1.0)


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x)))


def origin(lm, adapter=None, template="plain", method="query_likelihood", **options):
    template = load_template(template)
    facts = {"template": {"name": template.name, "fingerprint": template.fingerprint}, "adapter": adapter}
    return ScoreOrigin.of(lm.describe(), facts, method, {"normalize": "mean"} | options)


@pytest.fixture
def file(lm, tmp_path):
    """Return a function that writes a calibration file and returns its path."""

    def write(centred=False, **options):
        write_calibration(Calibration(CURVE, origin(lm, **options), centred), tmp_path / "calibration.json")
        return str(tmp_path / "calibration.json")

    return write


def ask(client, **more):
    body = {"query": QUERY, "documents": DOCUMENTS, **more}
    response = client.post("/v1/rerank", json=body)
    assert response.status_code == 200, response.text
    return {result["index"]: result["relevance_score"] for result in response.json()["results"]}


@pytest.mark.parametrize("centred", [False, True])
def test_the_model_alone_has_the_calibration_of_the_option(lm, file, offline, centred):
    raw = np.array(offline(QUERY, DOCUMENTS))
    used = raw - raw.mean() if centred else raw
    with ready(lambda: lm, Settings(port=0, max_wait_ms=0, calibration=file(centred))) as client:
        shown = ask(client)
        assert [shown[i] for i in range(len(raw))] == pytest.approx(sigmoid(2.0 * used - 1.0), abs=1e-5)
        assert list(shown) == sorted(shown, key=lambda i: -raw[i])
        best = ask(client, top_n=2)
        assert best == {i: shown[i] for i in list(shown)[:2]}, "the documents that are not returned count too"
        assert [ask(client, raw_scores=True)[i] for i in range(len(raw))] == pytest.approx(raw, abs=1e-5)
        (card,) = client.get("/v1/models").json()["data"]
        assert card["calibration"] == {"method": "platt", "centred": centred}


def test_what_cannot_be_read_is_improbable_and_does_not_count(lm, file, offline):
    raw = np.array(offline(QUERY, DOCUMENTS[:2]))
    with ready(lambda: lm, Settings(port=0, max_wait_ms=0, calibration=file(centred=True))) as client:
        shown = ask(client, documents=[*DOCUMENTS[:2], ""])
        assert shown[2] == 0.0
        assert [shown[0], shown[1]] == pytest.approx(sigmoid(2.0 * (raw - raw.mean()) - 1.0), abs=1e-5)


def test_an_adapter_has_that_of_its_folder(lm, tmp_path, file):
    folder = tmp_path / "adapters" / "mine"
    adapter = soft_prompt.build(soft_prompt.Config(length=2), lm)
    save_adapter(folder, "soft_prompt", adapter, lm, load_template("plain"))
    shutil.copytree(folder, folder.with_name("plain"))
    opened = load_adapter(folder, lm)
    own = origin(lm, adapter={"name": "soft_prompt", "sha256": opened.sha256})
    write_calibration(Calibration(CURVE, own), folder / "calibration.json")
    settings = Settings(port=0, max_wait_ms=0, adapters=str(folder.parent))
    with ready(lambda: lm, settings) as client:
        name = f"{lm.name}:mine"
        raw = ask(client, model=name, raw_scores=True)
        shown = ask(client, model=name)
        assert [shown[i] for i in raw] == pytest.approx(sigmoid(2.0 * np.array(list(raw.values())) - 1.0), abs=1e-5)
        cards = {card["id"]: card.get("calibration") for card in client.get("/v1/models").json()["data"]}
        assert cards == {lm.name: None, f"{lm.name}:plain": None, name: {"method": "platt", "centred": False}}
    write_calibration(Calibration(CURVE, own, fitted_on={"command": "rerank"}), folder / "calibration.json")
    shorter = Models(lm, Settings(adapters=str(folder.parent), max_passage_tokens=3))
    assert shorter.open("mine").calibration is not None, "nothing is known of that option"
    strict = origin(lm, adapter={"name": "soft_prompt", "sha256": opened.sha256}, max_passage_tokens=None)
    write_calibration(Calibration(CURVE, strict), folder / "calibration.json")
    with pytest.raises(
        AdapterError, match="'mine': its calibration was fitted on scores of max_passage_tokens None, not of 3"
    ):
        shorter.open("mine")


def test_a_method_is_known_by_the_name_that_it_was_given(lm, tmp_path, monkeypatch):
    def build_scorer(config, lm, opened, *, kept):
        return query_likelihood.build_scorer(config, lm, replace(opened, method="query_likelihood"), kept=kept)

    fast = SimpleNamespace(Config=query_likelihood.Config, build=query_likelihood.build, build_scorer=build_scorer)
    monkeypatch.setitem(methods._registry.registered, "fast", fast)
    folder = tmp_path / "adapters" / "mine"
    adapter = soft_prompt.build(soft_prompt.Config(length=2), lm)
    save_adapter(folder, "soft_prompt", adapter, lm, load_template("plain"), method="fast")
    own = {"name": "soft_prompt", "sha256": load_adapter(folder, lm).sha256}
    models = Models(lm, Settings(adapters=str(folder.parent)))
    write_calibration(Calibration(CURVE, origin(lm, own, method="fast")), folder / "calibration.json")
    assert models.open("mine").method == "fast"
    write_calibration(Calibration(CURVE, origin(lm, own)), folder / "calibration.json")
    with pytest.raises(AdapterError, match="of method query_likelihood, not of fast"):
        models.open("mine")


@pytest.mark.parametrize(
    ("options", "served", "words"),
    [
        ({"template": "upr"}, {}, "of template 'upr'"),
        ({}, {"template": "upr"}, "of template 'plain' .*, not of 'upr'"),
        ({"normalize": "sum"}, {}, "of normalize sum, not of mean"),
        ({"max_passage_tokens": None}, {"max_passage_tokens": 9}, "of max_passage_tokens None, not of 9"),
        ({"adapter": {"name": "lora", "sha256": "a" * 64}}, {}, "of adapter 'lora' .*, not of the model alone"),
    ],
)
def test_anothers_calibration_is_refused(lm, file, options, served, words):
    path = file(**options)
    with pytest.raises(InputError, match=f"--calibration {path} was fitted on scores {words}"):
        Models(lm, Settings(calibration=path, **served))


def test_a_file_that_is_no_calibration(lm, tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.json"):
        Models(lm, Settings(calibration=str(tmp_path / "nowhere.json")))
