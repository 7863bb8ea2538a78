"""Adapter folders are whole or absent, and fit their model or are refused by name."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qpeft.adapters import _folder
from qpeft.adapters._folder import (
    CALIBRATION,
    CONFIG,
    FACTS,
    WEIGHTS,
    load_adapter,
    open_adapter,
    read_config,
    save_adapter,
)
from qpeft.errors import AdapterError, OptionError
from qpeft.lm.causal import CausalLM
from qpeft.loading import load_lm
from qpeft.methods import query_likelihood
from qpeft.model_config import ModelConfig
from qpeft.template import load_template
from qpeft.types import Candidates
from tiny_adapters import NAMES, PASSAGES, QUERIES, build
from tiny_models import byte_level_tokenizer

PLAIN = load_template("plain")


@pytest.fixture
def lm(make_lm):
    return make_lm("llama")


@pytest.fixture
def folder(lm, tmp_path):
    """An adapter folder, and nothing beside it."""
    save_adapter(tmp_path / "mine", "qpeft_r", build("qpeft_r", lm, trained=True), lm, PLAIN)
    return tmp_path / "mine"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def renamed(lm, **changes):
    """Return the same model with other properties."""
    facts = {"tokenizer": lm.tokenizer, "name": lm.name, "max_length": 128, "batch_tokens": 4096} | changes
    model = facts.pop("model", lm.model)
    return CausalLM(model, facts.pop("tokenizer"), **facts)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_written(name, lm, tmp_path):
    adapter = build(name, lm, trained=True)
    facts = {"training": {"queries": 320}, "dev": {"measure": "RR@10", "trained": 0.5}, "seed": 7}
    save_adapter(tmp_path / "deep" / "mine", name, adapter, lm, PLAIN, max_passage_tokens=50, provenance=facts)
    folder = tmp_path / "deep" / "mine"
    assert sorted(contents(folder)) == ["README.md", CONFIG, WEIGHTS, "provenance.json"]
    assert [path.name for path in folder.parent.iterdir()] == ["mine"]
    described = read_config(folder)
    assert described["peft_type"] == "QPEFT"
    assert described["base_model_name_or_path"] == "tiny-llama"
    assert described["adapter"] == name
    assert described["max_passage_tokens"] == 50
    assert described["trained_parameters"] == adapter.count_parameters()
    tensors = load_file(folder / WEIGHTS)
    assert all(key.startswith("base_model.qpeft.") for key in tensors)
    assert sum(tensor.numel() for tensor in tensors.values()) == adapter.count_parameters(), "nothing frozen is kept"
    assert json.loads((folder / "provenance.json").read_text()) == facts
    card = (folder / "README.md").read_text()
    for words in (
        "base_model: tiny-llama",
        f"{adapter.count_parameters():,}",
        "template: plain",
        "queries: 320",
        "RR@10",
    ):
        assert words in card


def test_a_card_names_no_folder_as_its_base(lm, tmp_path, monkeypatch):
    """The model hub refuses cards whose base is no name of a model there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    for name, told in (("someone/large", True), ("/srv/models/mine", False), ("models/mine", False)):
        lm.name = name
        save_adapter(tmp_path / "a", "soft_prompt", build("soft_prompt", lm), lm, PLAIN)
        card = (tmp_path / "a" / "README.md").read_text()
        assert (f"base_model: {name}\n" in card) == told
        assert f"# soft_prompt for {name}" in card


def test_a_configuration_may_begin_with_a_byte_order_mark(lm, tmp_path):
    save_adapter(tmp_path / "a", "soft_prompt", build("soft_prompt", lm), lm, PLAIN)
    path = tmp_path / "a" / CONFIG
    path.write_text("\ufeff" + path.read_text())
    assert load_adapter(tmp_path / "a", lm).name == "soft_prompt"


def test_a_trainable_table_is_kept(lm, tmp_path):
    adapter = build("qpeft_a", lm, token_table="trainable", trained=True)
    save_adapter(tmp_path / "mine", "qpeft_a", adapter, lm, PLAIN)
    opened = load_adapter(tmp_path / "mine", lm).adapter
    assert torch.equal(opened.token_table, adapter.token_table)


def test_a_loaded_adapter_has_no_dropout(lm, tmp_path):
    save_adapter(tmp_path / "mine", "qpeft_a", build("qpeft_a", lm, attn_dropout=0.5), lm, PLAIN)
    assert not any(module.training for module in load_adapter(tmp_path / "mine", lm).adapter.modules())


def test_other_models_are_refused(folder, lm, make_lm):
    class Wide(torch.nn.Module):
        """A model whose embedding table has another shape."""

        def __init__(self, rows, width):
            super().__init__()
            self.table = torch.nn.Embedding(rows, width)
            self.config = lm.model.config
            self._is_stateful = False

        def get_input_embeddings(self):
            return self.table

    assert load_adapter(folder, make_lm("llama")).name == "qpeft_r"
    for other, words in (
        (renamed(lm, model=Wide(320, 64)), "'tiny-llama': its hidden size 32 is not that of 'tiny-llama', 64"),
        (renamed(lm, model=Wide(999, 32)), "its vocabulary size 320 is not that of 'tiny-llama', 999"),
        (renamed(lm, tokenizer=byte_level_tokenizer()), "'tiny-llama': its tokenizer"),
        (renamed(lm, name="other"), "was trained for 'tiny-llama', not for 'other'"),
    ):
        with pytest.raises(AdapterError, match=words) as caught:
            load_adapter(folder, other)
        assert str(folder) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_another_tokenizer_of_the_same_vocabulary_is_refused(folder, make_lm):
    other = make_lm("llama")
    other.tokenizer.eos_token = "[UNK]"
    with pytest.raises(AdapterError, match="its tokenizer"):
        load_adapter(folder, other)


def test_other_weights_are_refused(saved_model, tmp_path):
    lm = load_lm(ModelConfig(str(saved_model), dtype="float32"))
    save_adapter(tmp_path / "mine", "soft_prompt", build("soft_prompt", lm), lm, PLAIN)
    moved = shutil.copytree(saved_model, tmp_path / "moved")
    assert load_adapter(tmp_path / "mine", load_lm(ModelConfig(str(moved)))).name == "soft_prompt"
    tensors = load_file(moved / "model.safetensors")
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, moved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AdapterError, match=rf"with weights {lm.sha256:.12}; '.*moved' has weights [0-9a-f]+"):
        load_adapter(tmp_path / "mine", load_lm(ModelConfig(str(moved))))


def test_another_revision_is_refused(lm, make_lm, tmp_path):
    lm.model.config._commit_hash = "aaaa1111"
    save_adapter(tmp_path / "mine", "soft_prompt", build("soft_prompt", lm), lm, PLAIN)
    assert read_config(tmp_path / "mine")["revision"] == "aaaa1111"
    other = make_lm("llama")
    other.model.config._commit_hash = "bbbb2222"
    with pytest.raises(AdapterError, match="with revision aaaa1111; 'tiny-llama' has revision bbbb2222"):
        load_adapter(tmp_path / "mine", other)
    other.model.config._commit_hash = "aaaa1111"
    assert load_adapter(tmp_path / "mine", other).name == "soft_prompt"


@pytest.mark.parametrize("size", [0, 5, 300, -1])
def test_half_a_file_of_weights(folder, lm, size):
    weights = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(weights[:size])
    with pytest.raises(AdapterError, match=f"mine': {WEIGHTS} cannot be read: ") as caught:
        load_adapter(folder, lm)
    assert "\n" not in str(caught.value)


def test_weights_that_are_missing_superfluous_or_of_another_shape(folder, lm):
    tensors = load_file(folder / WEIGHTS)
    key = next(key for key, tensor in tensors.items() if tensor.ndim == 2)
    for damaged in (
        {k: v for k, v in tensors.items() if k != key},
        tensors | {"base_model.qpeft.more": torch.zeros(1)},
        tensors | {key: tensors[key].T.contiguous()},
    ):
        save_file(damaged, folder / WEIGHTS)
        with pytest.raises(AdapterError, match="cannot be read"):
            load_adapter(folder, lm)
    (folder / WEIGHTS).unlink()
    with pytest.raises(AdapterError, match=r"cannot be read: .*No such file"):
        load_adapter(folder, lm)


def test_configurations_that_cannot_be_used(folder, lm, tmp_path):
    described = json.loads((folder / CONFIG).read_text())
    options, template = described["options"], described["template"]
    for text, words in (
        ('{"peft_type": "LORA", "r": 8}', "not an adapter of qpeft .peft_type 'LORA'"),
        ("[]", "not an adapter of qpeft .peft_type None"),
        ((folder / CONFIG).read_text()[:100], "not readable as JSON"),
        (json.dumps({k: v for k, v in described.items() if k != "template"}), "not an adapter of qpeft"),
        (json.dumps(described | {"adapter": "qpeft_q"}), "unknown adapter 'qpeft_q'; did you mean"),
        (json.dumps(described | {"options": options | {"kk": 3}}), "has the option 'kk'"),
        (json.dumps(described | {"options": options | {"k": 0}}), "--k is 0"),
        (
            json.dumps(described | {"options": options | {"k": "many"}}),
            "--k is 'many'; it must be a whole number",
        ),
        (json.dumps(described | {"template": template | {"colour": "red"}}), "cannot be used: .*colour"),
        (json.dumps(described | {"template": template | {"target": "why"}}), "target holds .query"),
        (json.dumps(described | {"base": None}), "'base' cannot be None"),
        (json.dumps(described | {"adapter": 5}), "'adapter' cannot be 5"),
        (json.dumps(described | {"method": ["yes_no"]}), "'method' cannot be ..yes_no"),
        (json.dumps(described | {"method_options": 1}), "'method_options' cannot be 1"),
        (json.dumps(described | {"max_passage_tokens": "many"}), "'max_passage_tokens' cannot be 'many'"),
        (json.dumps(described | {"max_passage_tokens": True}), "'max_passage_tokens' cannot be True"),
        (json.dumps(described | {"max_passage_tokens": 0}), "'max_passage_tokens' is 0"),
        (json.dumps(described | {"template": template | {"instruction": 5}}), f"{CONFIG} cannot be used"),
        ("[" * 3000 + "]" * 3000, "not readable as JSON"),
    ):
        (folder / CONFIG).write_text(text)
        with pytest.raises(AdapterError, match=words) as caught:
            load_adapter(folder, lm)
        assert str(folder) in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(AdapterError, match=rf"no adapter in '{tmp_path}': {CONFIG} is missing"):
        load_adapter(tmp_path, lm)
    with pytest.raises(AdapterError, match="no adapter 'tiny-lm-qpeft-x'; did you mean 'tiny-lm-qpeft-"):
        load_adapter("tiny-lm-qpeft-x", lm)


def test_what_cannot_be_opened_leaves_nothing_in_the_model(lm, tmp_path):
    size = sum(parameter.numel() for parameter in lm.model.parameters())
    made = build("lora", lm)
    save_adapter(tmp_path / "mine", "lora", made, lm, PLAIN)
    made.withdraw()
    with pytest.raises(OptionError, match="was trained with 'plain'"):
        open_adapter(tmp_path / "mine", lm, load_template("upr"))
    with pytest.raises(OptionError, match="was trained for --method query_likelihood"):
        open_adapter(tmp_path / "mine", lm, None, method="yes_no")
    described = json.loads((tmp_path / "mine" / FACTS).read_text())
    calibration = tmp_path / "mine" / CALIBRATION
    calibration.write_text("{}")
    with pytest.raises(AdapterError, match=CALIBRATION):
        load_adapter(tmp_path / "mine", lm)
    calibration.unlink()
    (tmp_path / "mine" / FACTS).write_text(json.dumps(described | {"template": {"name": "plain"}}))
    with pytest.raises(AdapterError, match="cannot be used"):
        load_adapter(tmp_path / "mine", lm)
    assert sum(parameter.numel() for parameter in lm.model.parameters()) == size
    assert lm.model.peft_config == {}


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def fails_to_write(folder, lm):
    with pytest.raises(AdapterError, match=r"cannot be written: .*No space left on device"):
        save_adapter(folder, "qpeft_a", build("qpeft_a", lm), lm, PLAIN)


def test_a_failed_write_leaves_what_was_there(folder, lm, monkeypatch):
    before = contents(folder)
    monkeypatch.setattr(_folder, "save_file", full)
    fails_to_write(folder, lm)
    assert contents(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == ["mine"]
    fails_to_write(folder.parent / "new", lm)
    assert [path.name for path in folder.parent.iterdir()] == ["mine"]


@pytest.mark.parametrize("end", [0, 1], ids=["of the old folder", "of the new one"])
def test_a_failed_move_leaves_what_was_there(folder, lm, monkeypatch, end):
    before, replace, failed = contents(folder), os.replace, []

    def fail_once(*ends):
        if Path(ends[end]) == folder and not failed:
            failed.append(ends)
            full()
        replace(*ends)

    monkeypatch.setattr(os, "replace", fail_once)
    fails_to_write(folder, lm)
    monkeypatch.undo()
    assert failed
    assert contents(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == ["mine"]


def test_an_interrupted_write_leaves_nothing_behind(folder, lm, monkeypatch):
    before = contents(folder)

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(_folder, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_adapter(folder, "qpeft_a", build("qpeft_a", lm), lm, PLAIN)
    assert contents(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == ["mine"]


def test_a_new_folder_replaces_an_older_one_whole(folder, lm):
    (folder / "training.png").write_bytes(b"old")
    adapter = build("qpeft_a", lm, trained=True)
    save_adapter(folder, "qpeft_a", adapter, lm, PLAIN)
    assert sorted(contents(folder)) == ["README.md", CONFIG, WEIGHTS, "provenance.json"]
    assert load_adapter(folder, lm).name == "qpeft_a"
    assert [path.name for path in folder.parent.iterdir()] == ["mine"]


def test_saving_the_same_adapter_gives_the_same_bytes(folder, lm):
    before = contents(folder)
    save_adapter(folder, "qpeft_r", load_adapter(folder, lm).adapter, lm, PLAIN)
    assert contents(folder)[WEIGHTS] == before[WEIGHTS]


def rerank(lm, folder, **options):
    made = query_likelihood.build(query_likelihood.Config(adapter=str(folder), **options), lm)
    (ranking,) = made.rerank([Candidates(QUERIES[0], PASSAGES)])
    return made, ranking


def test_reranking_uses_the_adapter_and_its_template(lm, tmp_path):
    save_adapter(
        tmp_path / "mine",
        "qpeft_r",
        build("qpeft_r", lm, trained=True),
        lm,
        load_template("qpeft"),
        max_passage_tokens=3,
    )
    made, ranking = rerank(lm, tmp_path / "mine")
    opened = load_adapter(tmp_path / "mine", lm)
    assert made.facts["adapter"] == {"name": "qpeft_r", "sha256": opened.sha256}
    assert made.facts["template"]["name"] == "qpeft"
    assert made.counts.truncated_passages == 3
    zero_shot = query_likelihood.build(query_likelihood.Config(template="qpeft", max_passage_tokens=3), lm)
    assert ranking != next(iter(zero_shot.rerank([Candidates(QUERIES[0], PASSAGES)])))
    assert rerank(lm, tmp_path / "mine", max_passage_tokens=100)[0].counts.truncated_passages == 0


def test_another_template_is_refused(folder, lm, tmp_path):
    assert rerank(lm, folder)[1] == rerank(lm, folder, template="plain")[1]
    with pytest.raises(OptionError, match=r"--template qpeft: adapter '.*mine' was trained with 'plain'"):
        rerank(lm, folder, template="qpeft")
    changed = tmp_path / "plain.yaml"
    changed.write_text('name: plain\nversion: 1\ncontext: "Text: {passage}\\n{hint}"\ntarget: "Question: {query}"\n')
    with pytest.raises(OptionError, match=r"--template .*plain\.yaml: adapter '.*mine' was trained with 'plain'"):
        rerank(lm, folder, template=str(changed))


def test_encoder_decoders_take_no_adapter(folder, t5):
    with pytest.raises(OptionError, match="--adapter needs a decoder-only model"):
        query_likelihood.build(query_likelihood.Config(adapter=str(folder)), t5)


def test_windows_are_no_wider_than_what_was_trained_on(lm, tmp_path):
    adapter = build("soft_prompt", lm)
    save_adapter(tmp_path / "mine", "soft_prompt", adapter, lm, PLAIN, max_passage_tokens=9)
    options = {"adapter": str(tmp_path / "mine"), "window_overlap": 2}
    query_likelihood.build(query_likelihood.Config(**options, windows=9), lm)
    with pytest.raises(OptionError, match="--windows is 10; the adapter knows passages of at most 9 tokens"):
        query_likelihood.build(query_likelihood.Config(**options, windows=10), lm)
