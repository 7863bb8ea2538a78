import dataclasses
import json

import pytest
import torch

from qpeft.cli import main
from qpeft.commands import _tune
from qpeft.loading import load_lm, tuning_key_of
from qpeft.model_config import ModelConfig
from qpeft.tuning import Tuning, read_tuning, tuning_file, write_tuning
from tiny_models import can_compile

CPU = torch.device("cpu")
MEASURED = Tuning("float32", "eager", 777)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("QPEFT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def config(saved_model):
    return ModelConfig(str(saved_model), device="cpu")


def settings(lm):
    return lm.dtype, lm.attention_kernel, lm.batch_tokens


def test_what_was_measured_is_used_where_options_are_left_open(config, saved_model):
    before = settings(load_lm(config))
    write_tuning(tuning_key_of(config, CPU), MEASURED)
    assert settings(load_lm(config)) == ("float32", "eager", 777) != before
    given = ModelConfig(str(saved_model), device="cpu", dtype="bfloat16", attention_kernel="sdpa", batch_tokens=5)
    assert settings(load_lm(given)) == ("bfloat16", "sdpa", 5)
    wider = ModelConfig(str(saved_model), device="cpu", dtype="bfloat16")
    assert settings(load_lm(wider))[:2] == ("bfloat16", before[1]), "a kernel may not know every number type"
    other = ModelConfig(str(saved_model), device="cpu", passage_cache=0.1)
    assert load_lm(other).batch_tokens != 777, "measured without a passage cache"
    write_tuning(tuning_key_of(config, CPU), None)
    assert settings(load_lm(config)) == before


@pytest.mark.parametrize("text", ["", "{", "[]", '{"KEY": {"settings": {"dtype": "float32", "warp": 9}}}'])
def test_a_damaged_or_foreign_file_is_as_none(config, text):
    key = tuning_key_of(config, CPU)
    tuning_file().parent.mkdir(parents=True)
    tuning_file().write_text(text.replace("KEY", key))
    assert read_tuning(key) is None
    write_tuning(key, MEASURED)
    assert read_tuning(key) == MEASURED


def test_the_quickest_is_kept_only_if_it_beats_the_default(config, monkeypatch, capsys):
    slow = {"eager": 0.0}

    def score(self, rows, **options):
        tokens = self.batch_tokens if self.attention_kernel != "eager" else 1
        clock[0] += 1 + slow["eager"] * (self.attention_kernel == "eager") + 0.001 * (tokens != 1)
        return []

    clock = [0.0]
    monkeypatch.setattr("qpeft.lm.pretrained.PretrainedLM.log_probs", score)
    monkeypatch.setattr(_tune.time, "perf_counter", lambda: clock[0])
    key = tuning_key_of(config, CPU)
    write_tuning(key, MEASURED)
    _tune.tune(config, lambda lm: [None] * 4)
    assert read_tuning(key) is None, "a thousandth is no win, and what was kept before is not the default"
    assert "the default stays" in capsys.readouterr().out
    slow["eager"] = -0.5
    _tune.tune(config, lambda lm: [None] * 4)
    assert read_tuning(key).attention_kernel == "eager"
    assert json.loads(tuning_file().read_text())[key]["passages_per_second"] == pytest.approx(4 / 0.5)


def test_what_cannot_be_opened_is_passed_over(config, monkeypatch):
    """Two models may not fit into memory, nor one in another number type."""
    opened = []

    def load(model):
        assert timer is None or timer._lm is None, "the one before is gone"
        if model.dtype == "bfloat16":
            raise torch.OutOfMemoryError("no room")
        opened.append(model.dtype)
        return load_lm(model)

    timer = None
    monkeypatch.setattr(_tune, "load_lm", load)
    timer = _tune._Timer(dataclasses.replace(config, dtype="float32"), lambda lm: [])
    default = timer.default
    assert timer.seconds(dataclasses.replace(default, dtype="bfloat16")) is None
    assert timer.seconds(default) is not None
    assert opened == ["float32", "float32"]


def test_the_command_measures_real_settings(config, monkeypatch, capsys):
    monkeypatch.setattr(_tune, "ROUNDS", 1)
    threads = torch.get_num_threads()
    try:
        assert main(["doctor", "--tune", "--model", config.model, "--seconds", "0.01"]) == 0
    finally:
        torch.set_num_threads(threads)
    out = capsys.readouterr().out
    assert "attention_kernel sdpa" in out
    assert "dtype float32" in out
    assert ("compiled True" in out) == can_compile()
    assert "the default stays" in out or read_tuning(tuning_key_of(config, CPU)) is not None
