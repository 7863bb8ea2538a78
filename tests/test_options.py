"""Options from Python are checked like those of the command line."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from qpeft import adapters, methods
from qpeft.commands import train
from qpeft.errors import OptionError
from qpeft.model_config import ModelConfig
from qpeft.retrieval import bm25, dense
from qpeft.server.settings import Settings
from qpeft.training.config import TrainingConfig


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ModelConfig(dtype="bf16"), "--dtype is 'bf16'; did you mean 'bfloat16'?"),
        (lambda: ModelConfig(compile="ye"), "--compile is 'ye'; did you mean 'yes'?"),
        (lambda: ModelConfig(passage_cache="1"), "--passage-cache is '1'; it must be a number"),
        (lambda: ModelConfig(max_length=100.0), "--max-length is 100.0; it must be a whole number"),
        (lambda: ModelConfig(model=None), "--model is None; it must be text"),
        (lambda: ModelConfig(trust_remote_code="no"), "--trust-remote-code is 'no'; it must be True or False"),
        (lambda: methods.load("query_likelihood").Config(normalize="avg"), "--normalize is 'avg'; known: mean, sum"),
        (lambda: methods.load("cascade").Config(window_pool="Max"), "--window-pool is 'Max'; did you mean 'max'?"),
        (lambda: methods.load("yes_no").Config(windows=64.5), "--windows is 64.5; it must be a whole number"),
        (lambda: methods.load("classifier").Config(max_passage_tokens="64"), "--max-passage-tokens is '64'; it must"),
        (lambda: adapters.load("soft_prompt").Config(init="vocab"), "--init is 'vocab'; did you mean 'vocabulary'?"),
        (lambda: adapters.load("qpeft_a").Config(mlp_init="defualt"), "--mlp-init is 'defualt'; did you mean"),
        (lambda: adapters.load("qpeft_r").Config(k=True), "--k is True; it must be a whole number"),
        (lambda: TrainingConfig(learning_rate="1e-3"), "--learning-rate is '1e-3'; it must be a number"),
        (lambda: TrainingConfig(report_to="tensorboard"), "--report-to is 'tensorboard'; it must be a tuple or a list"),
        (lambda: Settings(cors_origin=("a", 1)), "--cors-origin is ('a', 1); it must be a tuple or a list of text"),
        (lambda: Settings(port="8080"), "--port is '8080'; it must be a whole number"),
        (lambda: bm25.Config(k1="a"), "--k1 is 'a'; it must be a number"),
        (lambda: bm25.Config(stemmer=3), "--stemmer is 3; it must be text"),
        (lambda: dense.Config(encode_batch="64"), "--encode-batch is '64'; it must be a whole number"),
        (lambda: train.Config("out", hint_queries="shufled"), "--hint-queries is 'shufled'; did you mean 'shuffled'?"),
    ],
)
def test_other_kinds_and_choices_are_named(make, words):
    with pytest.raises(OptionError) as error:
        make()
    assert str(error.value).startswith(words)


def test_numbers_of_numpy_and_paths_are_taken():
    config = ModelConfig(Path("some") / "model", max_length=np.int64(64), passage_cache=np.float32(0.5))
    assert json.dumps(dataclasses.asdict(config)).startswith('{"model": "some/model", "revision": null')
    assert (config.model, config.max_length, config.passage_cache) == ("some/model", 64, 0.5)
    assert TrainingConfig(epochs=1, report_to=[]).report_to == ()
    assert methods.load("query_likelihood").Config(adapter=Path("mine")).adapter == "mine"
