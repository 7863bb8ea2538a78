import copy
import dataclasses
import io
import json
import math
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertLMHeadModel, LlamaForCausalLM

from qpeft import Reranker
from qpeft.cli import main
from qpeft.errors import ModelError, OptionError, QueryError
from qpeft.lm.encoder_decoder import EncoderDecoderLM
from qpeft.loading import choose_dtype, load_lm
from qpeft.methods import query_likelihood
from qpeft.model_config import ModelConfig
from qpeft.provenance import weights_fingerprint
from qpeft.types import UNREADABLE, Passage

PASSAGES = ["the sky is blue", "the sea is salty", "the old king", "the sky is blue"]


def test_rank_and_predict_have_the_shapes_of_sentence_transformers(saved_model):
    reranker = Reranker.from_pretrained(str(saved_model), dtype="float32")
    ranked = reranker.rank("why is the sky blue?", PASSAGES)
    assert sorted(entry["corpus_id"] for entry in ranked) == [0, 1, 2, 3]
    assert [entry["score"] for entry in ranked] == sorted((entry["score"] for entry in ranked), reverse=True)
    same = [entry["corpus_id"] for entry in ranked if entry["corpus_id"] in (0, 3)]
    assert same == [0, 3], "equal scores keep the order given"
    many = reranker.rank("why", ["the sea"] * 12)
    assert [entry["corpus_id"] for entry in many] == list(range(12)), "also beyond the tenth"
    top = reranker.rank("why is the sky blue?", PASSAGES, top_k=2, return_documents=True)
    assert [entry["text"] for entry in top] == [PASSAGES[entry["corpus_id"]] for entry in ranked[:2]]
    pairs = [("why is the sky blue?", text) for text in PASSAGES] + [("who", PASSAGES[0])]
    scores = reranker.predict(pairs)
    assert scores[:4] == pytest.approx([s for _, s in sorted((e["corpus_id"], e["score"]) for e in ranked)], abs=1e-5)
    assert len(scores) == 5
    titled = [Passage("other-id", text, "Old kings") for text in PASSAGES]
    with_titles = reranker.rank("why is the sky blue?", titled, return_documents=True)
    assert {entry["text"] for entry in with_titles} == set(PASSAGES)
    by_place = {entry["corpus_id"]: entry["score"] for entry in with_titles}
    assert reranker.predict([("why is the sky blue?", each) for each in titled]) == [by_place[i] for i in range(4)]
    assert by_place[0] != scores[0]
    with pytest.raises(OptionError, match="top_k is 0"):
        reranker.rank("why", PASSAGES, top_k=0)


def test_what_cannot_be_read_is_below_everything_whatever_stands_beside_it(saved_model, capsys, monkeypatch):
    reranker = Reranker.from_pretrained(str(saved_model), dtype="float32")
    scattered = [("why", "the sky"), ("who", "the king"), ("why", " "), ("who", "")]
    scores = reranker.predict(scattered)
    assert scores[2] == scores[3] == UNREADABLE < min(scores[:2])
    assert reranker.predict(("why", "\n")) == UNREADABLE
    ranked = reranker.rank("why", ["", "the sky"])
    assert [entry["corpus_id"] for entry in ranked] == [1, 0]
    assert [entry["score"] for entry in ranked] == pytest.approx([scores[0], UNREADABLE], abs=1e-5)
    asked = "".join(json.dumps({"query": query, "passage": passage}) + "\n" for query, passage in scattered)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(asked.encode())))
    assert main(["score", "--model", str(saved_model), "--dtype", "float32"]) == 0
    found = [json.loads(line)["score"] for line in capsys.readouterr().out.splitlines()]
    assert found == pytest.approx(scores, abs=1e-5)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda it: it.rank("why", [math.nan, "x"]), "passage '0': its text is nan, not a text"),
        (lambda it: it.rank(None, ["x"]), "query 'query': its text is None, not a text"),
        (lambda it: it.rank("why", ["x", b"x"]), "passage '1': its text is b'x'"),
        (lambda it: it.rank("why", [{"text": "x"}]), "passage '0': its text is {'text': 'x'}"),
        (lambda it: it.rank("why", ["x"], top_k=1.5), "top_k is 1.5"),
        (lambda it: it.predict([("a", "b"), 3]), "pair 1 is 3"),
        (lambda it: it.predict([("a", 3)]), "passage '0': its text is 3"),
    ],
)
def test_what_is_no_text_is_named(saved_model, call, words):
    with pytest.raises(OptionError, match=re.escape(words)):
        call(Reranker.from_pretrained(str(saved_model), dtype="float32"))


def test_options_reach_model_and_method(saved_model):
    lm = load_lm(ModelConfig(str(saved_model), dtype="bfloat16", max_length=32))
    assert (lm.dtype, lm.max_length) == ("bfloat16", 32)
    facts = lm.describe()
    assert facts["sha256"] == weights_fingerprint(saved_model)
    assert facts["device"] in ("cpu", "cuda:0", "mps:0")
    cut = Reranker.from_pretrained(str(saved_model), max_length=25, template="qpeft")
    with pytest.raises(QueryError, match="the limit is 25"):
        cut.rank("why is the sky blue and who was the old king of the salty sea?", PASSAGES)
    with pytest.raises(OptionError, match="did you mean 'template'"):
        Reranker.from_pretrained(str(saved_model), templat="upr")


def test_float32_is_chosen_by_measurement_or_by_name(saved_model):
    assert load_lm(ModelConfig(str(saved_model), dtype="float32")).dtype == "float32"
    assert load_lm(ModelConfig(str(saved_model))).dtype in ("float32", "bfloat16", "float16")


def test_the_passage_cache_gives_the_same_ranking(saved_model):
    plain = Reranker.from_pretrained(str(saved_model), dtype="float32").rank("why", PASSAGES)
    cached = Reranker.from_pretrained(str(saved_model), dtype="float32", passage_cache=0.1).rank("why", PASSAGES)
    assert [e["corpus_id"] for e in plain] == [e["corpus_id"] for e in cached]
    assert [e["score"] for e in plain] == pytest.approx([e["score"] for e in cached], abs=1e-4)


def test_the_passage_cache_keeps_to_the_batch_size(saved_model):
    lm = load_lm(ModelConfig(str(saved_model), passage_cache=0.1, batch_tokens=1))
    reranker = query_likelihood.build(query_likelihood.Config(), lm)
    sizes = []
    lm.model.register_forward_hook(lambda module, inputs, output: sizes.append(len(output.logits)))
    reranker.rank("why", PASSAGES)
    assert set(sizes) == {1}


def test_folders_that_are_no_models(tmp_path):
    with pytest.raises(ModelError, match="has no config"):
        load_lm(ModelConfig(str(tmp_path)))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="no weights"):
        load_lm(ModelConfig(str(tmp_path)))
    with pytest.raises(ModelError, match="does not exist"):
        load_lm(ModelConfig(str(tmp_path / "nowhere")))
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(ModelError, match="cannot be opened"):
        load_lm(ModelConfig(str(tmp_path)))


@pytest.fixture
def broken(saved_model, tmp_path):
    """Return a copy of the saved model, to be damaged."""
    return shutil.copytree(saved_model, tmp_path / "broken")


def test_half_a_file_of_weights(broken):
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="cannot be opened"):
        load_lm(ModelConfig(str(broken)))


def test_weights_of_another_size(broken):
    config = broken / "config.json"
    config.write_text(config.read_text().replace('"hidden_size": 32', '"hidden_size": 64'))
    with pytest.raises(ModelError, match="cannot be opened"):
        load_lm(ModelConfig(str(broken)))


BERT = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}


@pytest.mark.filterwarnings("ignore")
def test_a_classifier_has_no_likelihoods(broken):
    BertForSequenceClassification(BertConfig(**BERT)).save_pretrained(broken)
    with pytest.raises(ModelError, match="is no language model"):
        load_lm(ModelConfig(str(broken)))


def test_a_model_that_sees_the_query_is_refused(broken):
    BertLMHeadModel(BertConfig(**BERT, initializer_range=0.5)).save_pretrained(broken)
    with pytest.raises(ModelError, match="reads in both directions"):
        load_lm(ModelConfig(str(broken)))
    BertLMHeadModel(BertConfig(**BERT, initializer_range=0.5, is_decoder=True)).save_pretrained(broken)
    assert not load_lm(ModelConfig(str(broken))).has_encoder


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"normalize": "average"}, "normalize is 'average'; known: mean, sum"),
        ({"dtype": "float61"}, "did you mean 'float16'"),
        ({"max_length": 0}, "max-length is 0"),
    ],
)
def test_values_that_no_option_has(saved_model, options, message):
    with pytest.raises(OptionError, match=message):
        Reranker.from_pretrained(str(saved_model), **options)


def test_a_hub_name_without_network_says_what_to_do():
    code = (
        "from qpeft.loading import load_lm; from qpeft.model_config import ModelConfig; "
        "load_lm(ModelConfig('some/model'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"HF_HUB_OFFLINE": "1", "HF_HOME": "/nonexistent"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert "ModelError: model 'some/model' is not a local folder" in last
    assert "--model path/to/folder" in last


@pytest.mark.parametrize(("generation", "dtype"), [(7, torch.float16), (8, torch.bfloat16)])
def test_a_bfloat16_that_a_gpu_emulates_is_not_chosen(monkeypatch, generation, dtype):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    generations = {0: 15 - generation, torch.device("cuda:1"): generation}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=generations[device]))
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda device: True)
    assert choose_dtype(torch.device("cuda:1")) == dtype


def test_a_model_that_is_too_large_for_its_device(saved_model, monkeypatch):
    def no_room(self, device):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(LlamaForCausalLM, "to", no_room)
    with pytest.raises(ModelError, match="does not fit in the memory of cpu"):
        load_lm(ModelConfig(str(saved_model), device="cpu"))


def test_attention_that_crashes_on_cpus(saved_model):
    with pytest.raises(OptionError, match="flex_attention is for GPUs"):
        load_lm(ModelConfig(str(saved_model), attention_kernel="flex_attention", device="cpu"))


def test_unknown_device(saved_model):
    with pytest.raises(OptionError, match="--device"):
        load_lm(ModelConfig(str(saved_model), device="gpu7"))


def test_the_embedded_model_loads_with_transformers_alone_and_ranks():
    from transformers import AutoModelForCausalLM

    from qpeft.loading import model_path

    model = AutoModelForCausalLM.from_pretrained(model_path("tiny-lm"), dtype="auto")
    assert model.dtype == torch.bfloat16
    ranked = Reranker.from_pretrained().rank(
        "what makes sea water salty",
        [
            "Bread rises because yeast gives off carbon dioxide.",
            "Rivers wash minerals out of rocks and carry them to the sea, where the salt stays when water evaporates.",
            "The piano has eighty-eight keys and three pedals.",
        ],
    )
    assert ranked[0]["corpus_id"] == 1


def test_positions_of_a_t5_are_no_limit(t5, tmp_path):
    t5.model.config.n_positions = 512
    t5.model.save_pretrained(tmp_path)
    t5.tokenizer.save_pretrained(tmp_path)
    assert load_lm(ModelConfig(str(tmp_path), max_length=1024)).max_length == 1024
    assert load_lm(ModelConfig(str(tmp_path))).max_length == 512


@pytest.mark.skipif(find_spec("sentencepiece") is not None, reason="sentencepiece is installed and reads the file")
def test_a_vocabulary_that_needs_another_package(t5, tmp_path):
    t5.model.save_pretrained(tmp_path)
    (tmp_path / "spiece.model").write_bytes(b"\n\x0b\n\x05<pad>\x15\0\0\0\0")
    with pytest.raises(ModelError, match="needs the package sentencepiece"):
        load_lm(ModelConfig(str(tmp_path)))


def test_which_token_a_decoder_begins_with(t5):
    model = copy.deepcopy(t5.model)
    model.config.decoder_start_token_id, model.generation_config.decoder_start_token_id = None, 7
    found = [EncoderDecoderLM(model, t5.tokenizer, name="t5", max_length=64, batch_tokens=64)._start]
    model.generation_config.decoder_start_token_id, model.config.bos_token_id = None, 9
    found.append(EncoderDecoderLM(model, t5.tokenizer, name="t5", max_length=64, batch_tokens=64)._start)
    assert found == [7, 9]
    model.config.bos_token_id = None
    with pytest.raises(ModelError, match="which token the decoder begins with"):
        EncoderDecoderLM(model, t5.tokenizer, name="t5", max_length=64, batch_tokens=64)._start  # noqa: B018


def test_words_without_an_embedding_are_refused(saved_model, tmp_path):
    """Special tokens may be more: no text has them."""
    folder = shutil.copytree(saved_model, tmp_path / "model")
    config = ModelConfig(str(folder), dtype="float32")
    lm = load_lm(config)
    known = lm.embeddings.num_embeddings
    for special in (True, False):
        tokenizer = copy.deepcopy(lm.tokenizer)
        tokenizer.add_tokens([f"<filler{i}>" for i in range(known - len(tokenizer))])
        tokenizer.add_tokens(["<more>"], special_tokens=special)
        assert len(tokenizer) == known + 1
        tokenizer.save_pretrained(folder)
        if special:
            reranker = query_likelihood.build(query_likelihood.Config(), load_lm(config))
            assert reranker.predict(("why", "the <more> sky")) < 0
        else:
            with pytest.raises(ModelError, match=f"makes '<more>' token {known}: its embeddings were not resized"):
                load_lm(config)


def test_contexts_of_another_kernel_or_type_lie_in_another_folder(saved_model, tmp_path):
    kept = ModelConfig(str(saved_model), dtype="float32", passage_cache_folder=str(tmp_path))
    others = {"attention_kernel": "eager"}, {"dtype": "bfloat16"}, {"passage_cache_storage": "int8"}
    folders = [load_lm(dataclasses.replace(kept, **other)).store.folder for other in ({}, {}, *others)]
    assert folders[0] == folders[1]
    assert len(set(folders)) == 4
