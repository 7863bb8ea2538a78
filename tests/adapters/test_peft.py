import sys

import peft
import pytest

from qpeft import adapters
from qpeft.adapters import soft_prompt
from qpeft.adapters._folder import save_adapter
from qpeft.errors import MissingDependencyError, ModelError
from qpeft.template import load_template
from tiny_models import build_family

TABLES = [getattr(peft.mapping, f"PEFT_TYPE_TO_{kind}_MAPPING") for kind in ("CONFIG", "TUNER", "PREFIX")]


@pytest.fixture
def folder(make_lm, tmp_path, monkeypatch):
    """A folder of the type QPEFT, and PEFT as it was afterwards."""
    for table in TABLES:
        monkeypatch.delitem(table, "QPEFT", raising=False)
    lm = make_lm("llama")
    made = soft_prompt.build(soft_prompt.Config(length=2), lm)
    save_adapter(tmp_path / "a", "soft_prompt", made, lm, load_template("plain"), max_passage_tokens=7)
    yield tmp_path / "a"
    for table in TABLES:
        table.pop("QPEFT", None)


def test_peft_reads_the_folder_once_it_knows_the_type(folder):
    with pytest.raises(KeyError):
        peft.PeftConfig.from_pretrained(folder)
    for _ in range(2):
        adapters.register_with_peft()
    config = peft.PeftConfig.from_pretrained(folder)
    assert (config.peft_type, config.adapter, config.max_passage_tokens) == ("QPEFT", "soft_prompt", 7)
    assert config.options["length"] == 2
    assert config.template["name"] == "plain"
    assert config.base_model_name_or_path == config.base["name"] == "tiny-llama"
    config.save_pretrained(folder.parent / "copy")
    assert peft.PeftConfig.from_pretrained(folder.parent / "copy") == config


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")  # which peft asks
def test_peft_says_where_to_open_it(folder):
    adapters.register_with_peft()
    with pytest.raises(ModelError, match=r"qpeft\.Reranker\.from_pretrained"):
        peft.PeftModel.from_pretrained(build_family("llama"), folder)


def test_without_peft_or_with_another(folder, monkeypatch):
    monkeypatch.delattr(peft.mapping, "PEFT_TYPE_TO_TUNER_MAPPING")
    with pytest.raises(ModelError, match="cannot be told of other adapter types"):
        adapters.register_with_peft()
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingDependencyError, match=r"qpeft\[lora\]"):
        adapters.register_with_peft()
