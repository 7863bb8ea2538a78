"""Training in two processes, as torchrun starts them: the same as twice the gradient accumulation in one."""

import json
import os
import subprocess
import sys
import time

import psutil
import pytest
import torch
from safetensors.torch import load_file
from test_bad_input import fails
from test_train import GROUPS, newest_step

from qpeft.adapters._folder import WEIGHTS
from qpeft.cli import main
from tiny_adapters import SMALL


@pytest.fixture
def arguments(toy, saved_model, tmp_path):
    """Return a function that makes the arguments of a training on five groups, in batches of two."""
    path = tmp_path / "train.jsonl"
    groups = [*GROUPS, *({**group, "query": f"{group['query']} again"} for group in GROUPS[:2])]
    path.write_text("".join(json.dumps(group) + "\n" for group in groups))

    def make(name, *more, adapter="qpeft_a"):
        options = {**SMALL, "lora": {"r": 2}}[adapter]
        small = [word for option, value in options.items() for word in (f"--{option}", str(value))]
        return [
            "train", "--output", str(tmp_path / name), "--train-file", str(path), "--collection", str(toy),
            "--model", str(saved_model), "--dtype", "float32", "--adapter", adapter, *small, "--batch-queries", "2",
            "--epochs", "4", "--negatives", "2", "--evaluations", "5", "--dev-depth", "6", "--learning-rate", "0.01",
            *more,
        ]  # fmt: skip

    return make


@pytest.fixture
def start():
    """Return a function that starts a command in two processes."""
    started = []

    def torchrun(arguments):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
        process = subprocess.Popen(
            [*launcher, "--", "qpeft", *arguments],
            env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield torchrun
    for process in started:
        kill(process)
        process.stderr.close()


def kill(process):
    """Kill the launcher and what it started."""
    if process.poll() is None:
        for each in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
            each.kill()
    process.wait()


def run(process):
    """Wait for success, and return what was said."""
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 0, said
    return said


@pytest.mark.parametrize("adapter", ["qpeft_a", "lora"])
def test_two_processes_do_what_one_does_with_twice_the_accumulation(adapter, arguments, start, tmp_path):
    assert main(arguments("one", "--gradient-accumulation", "2", adapter=adapter)) == 0
    said = run(start(arguments("two", "--keep-every", "2", adapter=adapter)))
    assert said.count("zero-shot") == said.count(f"{adapter}: ") == 1, "one of them speaks"
    one, two = (json.loads((tmp_path / name / "provenance.json").read_text()) for name in ("one", "two"))
    assert (one["training"]["processes"], two["training"]["processes"]) == (1, 2)
    assert one["training"]["steps"] == two["training"]["steps"] == 5
    assert two["dev"] == pytest.approx(one["dev"])
    losses = [[entry["loss"] for entry in facts["history"] if "loss" in entry] for facts in (one, two)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert len(losses[0]) == 5
    tensors = [load_file(tmp_path / name / WEIGHTS) for name in ("one", "two")]
    for name, tensor in tensors[0].items():
        torch.testing.assert_close(tensors[1][name], tensor, rtol=1e-4, atol=1e-5)
    assert sorted(path.name for path in (tmp_path / "two.steps").glob("step-*")) == [
        f"step-{step:06d}" for step in (0, 2, 4, 5)
    ]
    assert not (tmp_path / "two.checkpoints").exists()


def test_killed_processes_resume_together_to_the_same_bytes(arguments, start, tmp_path):
    more = ("--epochs", "40", "--evaluations", "50")
    whole = start(arguments("whole", *more))
    process = start(arguments("mine", *more))
    checkpoints = tmp_path / "mine.checkpoints"
    deadline = time.monotonic() + 120
    while process.poll() is None and newest_step(checkpoints) < 5 and time.monotonic() < deadline:
        time.sleep(0.005)
    kill(process)
    assert newest_step(checkpoints) >= 5
    assert not (tmp_path / "mine").exists()
    run(whole)
    assert main(arguments("mine", *more, "--resume")) == 2, "one process would go on otherwise"
    run(start(arguments("mine", *more, "--resume")))
    facts = [json.loads((tmp_path / name / "provenance.json").read_text()) for name in ("whole", "mine")]
    assert facts[0]["history"] == facts[1]["history"]
    assert (tmp_path / "mine" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()


def test_an_error_of_one_is_the_error_of_all(arguments, start, tmp_path):
    process = start(arguments("mine", "--measure", "nonsense"))
    said = process.communicate(timeout=300)[1]
    assert process.returncode != 0
    assert "qpeft: error: " in said
    assert not (tmp_path / "mine").exists()


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE is 2"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2 and RANK is missing"),
        ({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "x"}, "MASTER_PORT is missing"),
        ({"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_FSDP": "true"}, "ACCELERATE_USE_FSDP is true"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "ACCELERATE_MIXED_PRECISION is bf16"),
    ],
)
def test_other_launchers_are_refused_before_anything_is_read(told, words, arguments, tmp_path, monkeypatch, capsys):
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    fails(arguments("mine", "--collection", "nowhere"), capsys, tmp_path, words, "with torchrun")
