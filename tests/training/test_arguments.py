"""Where training runs, and where its logs go."""

import pytest
import torch
from transformers import TrainerCallback
from transformers.integrations import integration_utils
from transformers.training_args import ParallelMode

from qpeft.errors import OptionError
from qpeft.training.arguments import OneDevice
from qpeft.training.config import TrainingConfig
from qpeft.training.processes import together
from qpeft.training.trainer import Collator, fit
from tiny_adapters import build, with_store
from tiny_training import FAST, GROUPS, dev_for, scorer_for


@pytest.fixture
def lm(make_lm):
    return with_store(make_lm("llama"))


def train(lm, adapter, folder, **options):
    config = TrainingConfig(**(FAST | {"epochs": 1} | options))
    scorer = scorer_for(lm, adapter)
    collator, dev = Collator(scorer, config, 0), dev_for(scorer)
    return fit(scorer, adapter, GROUPS, collator, config, checkpoints=folder, seed=0, dev=dev, progress=False)


def test_what_is_trained_stays_with_the_frozen_model(lm, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "meta")  # where the Trainer would move it by itself
    adapter = build("soft_prompt", lm)
    before = adapter.vectors.detach().clone()
    assert train(lm, adapter, tmp_path).steps == 2
    assert adapter.vectors.device == lm.device
    assert not torch.equal(adapter.vectors, before)


def test_one_of_several_gpus(tmp_path, monkeypatch):
    current = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    arguments = OneDevice(output_dir=str(tmp_path), where="cuda:1", report_to="none")
    assert arguments.device == arguments.distributed_state.device == torch.device("cuda:1")
    assert (arguments.n_gpu, arguments.parallel_mode) == (1, ParallelMode.NOT_PARALLEL)
    assert arguments.train_batch_size == arguments.per_device_train_batch_size
    assert current == [torch.device("cuda:1")]


def test_processes_meet_with_a_gpu_of_their_own_each(monkeypatch):
    """NCCL sends objects by way of the current device, and refuses two processes that are on one."""
    told = []
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "set_device", told.append)
    for name in ("init_process_group", "barrier", "destroy_process_group"):
        monkeypatch.setattr(torch.distributed, name, lambda *args, name=name: told.append((name, *args)))
    with together(torch.device("cuda:1")):
        assert told == [torch.device("cuda:1"), ("init_process_group", "nccl")]


@pytest.mark.parametrize("name", ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE"])
def test_several_processes_need_torchrun(name, lm, tmp_path, monkeypatch):
    monkeypatch.setenv(name, "2")
    with pytest.raises(OptionError, match=f"{name} is 2.*with torchrun"):
        train(lm, build("soft_prompt", lm), tmp_path / "c")
    assert not (tmp_path / "c").exists()
    monkeypatch.setenv(name, "1")
    assert train(lm, build("soft_prompt", lm), tmp_path / "c").steps == 2


class Tracker(TrainerCallback):
    """Stands for one that is installed."""

    logged: list[dict] = []  # noqa: RUF012

    def on_log(self, args, state, control, logs, **kwargs):
        self.logged.append(dict(logs))


def test_a_tracker_gets_what_is_logged(lm, tmp_path, monkeypatch):
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tensorboard", Tracker)
    monkeypatch.setattr(Tracker, "logged", [])
    train(lm, build("soft_prompt", lm), tmp_path, report_to=("tensorboard",))
    assert {"loss", "eval_RR@10"} <= {name for logs in Tracker.logged for name in logs}


def test_trackers_that_are_not_there(monkeypatch):
    with pytest.raises(OptionError, match="--report-to tensorbord: no such tracker; did you mean 'tensorboard'"):
        TrainingConfig(report_to=("tensorbord",))
    monkeypatch.setattr(integration_utils, "is_wandb_available", lambda: False)
    with pytest.raises(OptionError, match=r"--report-to wandb: .*requires wandb to be installed"):
        TrainingConfig(report_to=("wandb",))
    assert TrainingConfig(report_to=("none",)).report_to == ("none",)
