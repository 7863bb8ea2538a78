import errno
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_bad_input import fails
from test_odd_architectures import save as save_odd
from transformers import TrainerCallback
from transformers.integrations import integration_utils

from qpeft.adapters._folder import WEIGHTS, load_adapter, read_config
from qpeft.cli import main
from qpeft.commands._checkpoints import claim, read_mark
from qpeft.data.collection import open_collection
from qpeft.data.trec import read_run, write_run
from qpeft.errors import StateError
from qpeft.loading import load_lm, tuning_key_of
from qpeft.model_config import ModelConfig
from qpeft.provenance import provenance, write_provenance
from qpeft.template import Prompt, load_template
from qpeft.training import trainer
from qpeft.training.trainer import Learner
from qpeft.tuning import Tuning, write_tuning
from qpeft.types import Ranking, Run
from tiny_adapters import NAMES, SMALL
from tiny_models import build_family, byte_level_tokenizer

GROUPS = [
    {"query": "why is the sky blue?", "pos": ["the sky is blue"], "neg": ["the sea is salty", "the old cat"]},
    {"query": "who made the lake", "pos": ["the new king made a lake"], "neg": ["the king and the lion"]},
    {"query": "three heart", "pos": ["the octopus has three heart"], "neg": ["the red sky", "a long river"]},
]


@pytest.fixture(scope="module")
def collection(toy, tmp_path_factory):
    """The toy with a training split, and without answers, which all of its passages hold."""
    folder = tmp_path_factory.mktemp("train") / "toy"
    shutil.copytree(toy, folder)
    queries = [json.loads(line) for line in (folder / "queries.jsonl").read_text().splitlines()]
    lines = [json.dumps({"_id": query["_id"], "text": query["text"]}) for query in queries]
    (folder / "queries.jsonl").write_text("\n".join(lines) + "\n")
    shutil.copy(folder / "qrels" / "dev.tsv", folder / "qrels" / "train.tsv")
    return folder


@pytest.fixture
def arguments(collection, saved_model):
    """Return a function that makes the arguments of a training of six steps."""

    def make(output, *more, adapter="qpeft_a", data=None):
        small = [word for name, value in SMALL[adapter].items() for word in (f"--{name}", str(value))]
        return [
            "train", "--output", str(output), *(data or ["--collection", str(collection)]),
            "--model", str(saved_model), "--dtype", "float32", "--adapter", adapter, *small,
            "--batch-queries", "2", "--epochs", "2", "--negatives", "2", "--evaluations", "3", "--dev-depth", "6",
            "--learning-rate", "0.01", *more,
        ]  # fmt: skip

    return make


@pytest.fixture
def train_file(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(group) + "\n" for group in GROUPS))
    return path


@pytest.mark.parametrize("adapter", NAMES)
def test_a_trained_adapter_reranks(adapter, arguments, rerank_arguments, saved_model, tmp_path, capsys):
    output = tmp_path / "mine"
    assert main(arguments(output, "--max-passage-tokens", "9", adapter=adapter)) == 0
    said = capsys.readouterr().err
    assert f"{adapter}: " in said
    assert "6 queries" in said
    assert "zero-shot " in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine"]
    lm = load_lm(ModelConfig(str(saved_model), dtype="float32"))
    opened = load_adapter(output, lm)
    assert (opened.name, opened.template, opened.max_passage_tokens) == (adapter, load_template("plain"), 9)
    untrained = dict(load_untrained(adapter, lm).state_dict())
    assert any(not torch.equal(untrained[name], tensor) for name, tensor in opened.adapter.state_dict().items())

    facts = json.loads((output / "provenance.json").read_text())
    assert facts["training"]["steps"] == 6
    assert facts["training"]["trained_parameters"] == read_config(output)["trained_parameters"] > 0
    assert facts["dev"]["measure"] == "RR@10"
    assert 0 < facts["dev"]["zero_shot"] <= 1
    assert facts["dev"]["trained"] == max(entry.get("eval_RR@10", 0) for entry in facts["history"])
    assert facts["model"]["dtype"] == "float32"
    assert facts["mining"]["queries"] == 6

    runs = []
    for more in (["--adapter", str(output)], ["--max-passage-tokens", "9"]):
        assert main(rerank_arguments(tmp_path / "ql.trec", *more)) == 0
        runs.append(read_run(tmp_path / "ql.trec"))
    assert dict(runs[0]) != dict(runs[1])
    capsys.readouterr()


def load_untrained(adapter, lm):
    from qpeft import adapters

    torch.manual_seed(0)
    module = adapters.load(adapter)
    return module.build(module.Config(**SMALL[adapter]), lm)


def test_provenance_of_a_reranking_names_the_adapter(arguments, rerank_arguments, tmp_path):
    assert main(arguments(tmp_path / "mine", adapter="soft_prompt")) == 0
    assert main(rerank_arguments(tmp_path / "ql.trec", "--adapter", str(tmp_path / "mine"))) == 0
    facts = json.loads((tmp_path / "ql.trec.provenance.json").read_text())
    assert facts["adapter"]["name"] == "soft_prompt"
    assert len(facts["adapter"]["sha256"]) == 64


def test_the_same_command_gives_the_same_bytes(arguments, tmp_path):
    for name in ("a", "b"):
        assert main(arguments(tmp_path / name)) == 0
    assert main(arguments(tmp_path / "c", "--seed", "1")) == 0
    first, again, other = ((tmp_path / name / WEIGHTS).read_bytes() for name in "abc")
    assert first == again != other


def interrupt(monkeypatch, after):
    """Let Ctrl-C fall into a forward pass."""
    calls, forward = [], Learner.forward

    def interrupted(self, batch):
        calls.append(batch)
        if len(calls) > after:
            raise KeyboardInterrupt
        return forward(self, batch)

    monkeypatch.setattr(Learner, "forward", interrupted)


@pytest.mark.parametrize("more", [(), ("--attn-dropout", "0.2", "--patience", "2"), ("--gradient-accumulation", "2")])
def test_an_interrupted_training_resumes_to_the_same_bytes(arguments, tmp_path, monkeypatch, capsys, more):
    whole, output = tmp_path / "whole", tmp_path / "mine"
    assert main(arguments(whole, *more)) == 0
    with monkeypatch.context() as patch:
        interrupt(patch, after=5)
        assert main(arguments(output, *more)) == 130
    assert not output.exists()
    assert list((tmp_path / "mine.checkpoints").glob("checkpoint-*"))
    capsys.readouterr()
    assert main(arguments(output, *more)) == 2
    assert "mine.checkpoints is an unfinished training: continue it with --resume" in capsys.readouterr().err
    assert main(arguments(output, *more, "--resume", "--margin", "0.7")) == 2
    assert "other options, data or model (--margin was 0.5 and is 0.7); delete it" in capsys.readouterr().err
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert main(arguments(output, *more, "--resume")) == 0
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(threads)
    assert (output / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    facts = [json.loads((folder / "provenance.json").read_text()) for folder in (output, whole)]
    assert facts[0]["history"] == facts[1]["history"]
    assert facts[0]["dev"] == facts[1]["dev"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "whole"]


def test_a_finished_training_is_not_done_again(arguments, saved_model, tmp_path, capsys):
    output, model = tmp_path / "mine", tmp_path / "model"
    shutil.copytree(saved_model, model)
    of_model = ("--model", str(model))
    assert main(arguments(output, *of_model)) == 0
    before = {path.name: path.stat().st_mtime_ns for path in output.iterdir()}
    capsys.readouterr()
    assert main(arguments(output, *of_model, "--resume")) == 0
    assert f"{output}: is finished" in capsys.readouterr().err
    assert main(arguments(output, *of_model, "--resume", "--margin", "0.7")) == 2
    assert "other options, data or model (--margin was 0.5 and is 0.7)" in capsys.readouterr().err
    with (model / "config.json").open("a") as file:
        file.write("\n")
    assert main(arguments(output, *of_model, "--resume")) == 2
    assert "other options, data or model (model.sha256)" in capsys.readouterr().err
    assert {path.name: path.stat().st_mtime_ns for path in output.iterdir()} == before


def test_dev_is_ranked_as_often_as_asked_for_and_the_end_is_too(arguments, tmp_path, capsys):
    output = tmp_path / "mine"
    assert main(arguments(output, "--evaluations", "4", "--learning-rate", "1e-12")) == 0
    made = json.loads((output / "provenance.json").read_text())
    measured = [entry["step"] for entry in made["history"] if "eval_RR@10" in entry]
    assert made["training"]["steps"] == 6
    assert measured == [2, 4, 6]  # at most four times, and after a whole number of steps
    assert "note: on dev, training made it no better than it was" in capsys.readouterr().err


def test_what_is_no_part_of_an_adapter_is_not_deleted(arguments, tmp_path, capsys):
    output = tmp_path / "mine"
    assert main(arguments(output)) == 0
    (output / "test.trec").write_text("q1 Q0 sky-0 1 1.0 mine\n")
    assert main(arguments(output)) == 2
    assert "holds 'test.trec', which is no part of an adapter" in capsys.readouterr().err
    assert (output / "test.trec").is_file()


def test_what_was_tuned_in_between_is_another_training(arguments, saved_model, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("QPEFT_CACHE", str(tmp_path / "cache"))
    with monkeypatch.context() as patch:
        interrupt(patch, after=5)
        assert main(arguments(tmp_path / "mine")) == 130
    config = ModelConfig(str(saved_model), passage_cache=4)
    key = tuning_key_of(config, torch.device("cpu"))
    write_tuning(key, Tuning("float32", "eager", 777))
    capsys.readouterr()
    assert main(arguments(tmp_path / "mine", "--resume")) == 2
    assert "other options, data or model (model." in capsys.readouterr().err
    write_tuning(key, None)
    assert main(arguments(tmp_path / "mine", "--resume")) == 0


def test_what_ended_before_its_first_checkpoint_starts_afresh(arguments, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt(patch, after=1)
        assert main(arguments(tmp_path / "mine")) == 130
    assert main(arguments(tmp_path / "mine", "--margin", "0.7")) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine"]


def newest_step(checkpoints):
    return max((int(path.name.partition("-")[2]) for path in checkpoints.glob("checkpoint-*")), default=0)


def test_a_killed_training_resumes_to_the_same_bytes(arguments, start_process, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
    whole, output, checkpoints = (tmp_path / name for name in ("whole", "mine", "mine.checkpoints"))
    more = ("--epochs", "60", "--evaluations", "60", "--keep-every", "50")
    assert main(arguments(whole, *more)) == 0
    draw = random.Random(3)
    for step in (draw.randrange(1, 50), draw.randrange(60, 120)):
        process = start_process(arguments(output, *more, "--resume"), stdout=-3, stderr=-3)
        deadline = time.monotonic() + 120
        while process.poll() is None and newest_step(checkpoints) < step and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.05))  # so that it falls into a step, an evaluation or a file
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert not output.exists()
    assert main(arguments(output, *more, "--resume")) == 0
    facts = [json.loads((folder / "provenance.json").read_text()) for folder in (output, whole)]
    assert facts[0]["training"]["steps"] == facts[1]["training"]["steps"] == 180
    assert facts[0]["history"] == facts[1]["history"]
    for one in sorted(tmp_path.glob("whole*/**/" + WEIGHTS)):
        other = tmp_path / str(one.relative_to(tmp_path)).replace("whole", "mine", 1)
        assert other.read_bytes() == one.read_bytes()
    assert (tmp_path / "mine.steps" / "step-000180").is_dir()


def test_a_full_disk_costs_one_checkpoint(arguments, tmp_path, monkeypatch, capsys):
    whole, output, write, written = tmp_path / "whole", tmp_path / "mine", trainer.save_file, []
    assert main(arguments(whole)) == 0

    def full(tensors, path):
        written.append(path)
        if len(written) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(tensors, path)

    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "save_file", full)
        assert main(arguments(output)) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("qpeft: error:")]
    checkpoints = tmp_path / "mine.checkpoints"
    (line,) = said
    failed = checkpoints / "checkpoint-4"
    assert line.startswith(f"qpeft: error: {failed} cannot be written: [Errno 28] No space left on device (")
    assert line.endswith(" MiB are free there)")
    assert [path.name for path in checkpoints.glob("checkpoint-*")] == ["checkpoint-2"]
    assert main(arguments(output, "--resume")) == 0
    assert (output / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()


def test_a_folder_that_cannot_be_written(arguments, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    command = arguments(tmp_path / "file" / "mine")
    fails(command, capsys, tmp_path, "mine.checkpoints: Not a directory")


def test_a_file_of_groups(arguments, train_file, collection, tmp_path, capsys):
    assert main(arguments(tmp_path / "mine", data=["--train-file", str(train_file)])) == 0
    facts = json.loads((tmp_path / "mine" / "provenance.json").read_text())
    assert facts["training"]["queries"] == 3
    assert facts["training"]["steps"] == 3
    assert facts["collection"] is None
    assert facts["dev"] is None
    both = ["--train-file", str(train_file), "--collection", str(collection)]
    assert main(arguments(tmp_path / "both", "--train-queries", "2", data=both)) == 0
    facts = json.loads((tmp_path / "both" / "provenance.json").read_text())
    assert facts["training"]["queries"] == facts["mining"]["queries"] == 2
    assert facts["dev"]["trained"] > 0
    assert len(facts["files"]["train_file"]) == 64
    capsys.readouterr()


def test_another_train_file_is_no_continuation(arguments, train_file, tmp_path, monkeypatch, capsys):
    data = ["--train-file", str(train_file)]
    with monkeypatch.context() as patch:
        interrupt(patch, after=2)
        assert main(arguments(tmp_path / "mine", data=data)) == 130
    train_file.write_text(train_file.read_text().replace("the old cat", "a dog"))
    assert main(arguments(tmp_path / "mine", "--resume", data=data)) == 2
    assert "other options, data or model (files.train_file); delete it" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--train-file", "--run", "--dev-run"])
def test_pipes_are_refused_since_files_are_read_twice(
    arguments, collection, train_file, toy_run, tmp_path, capsys, option
):
    reading, writing = os.pipe()
    os.write(writing, (train_file if option == "--train-file" else toy_run).read_bytes())
    os.close(writing)
    data = [option, f"/dev/fd/{reading}"] + (["--collection", str(collection)] if option != "--train-file" else [])
    fails(arguments(tmp_path / "mine", data=data), capsys, tmp_path, f"{option} /dev/fd/{reading}: is a pipe")
    os.close(reading)


def test_a_teacher(arguments, toy_run, tmp_path):
    more = ["--teacher", str(toy_run), "--loss", "margin_mse"]
    assert main(arguments(tmp_path / "mine", *more, adapter="soft_prompt")) == 0
    assert json.loads((tmp_path / "mine" / "provenance.json").read_text())["history"][0]["loss"] > 0


def test_pairs_without_a_teachers_score(arguments, collection, toy_run, tmp_path, capsys):
    run, qrels = read_run(toy_run), open_collection(str(collection)).qrels("train")

    def write(path, keep):
        kept = [
            Ranking(query_id, tuple(hit for hit in ranking.hits if keep(query_id, hit)))
            for query_id, ranking in run.items()
        ]
        write_run(Run(kept, "teacher"), path)
        return ["--teacher", str(path), "--loss", "margin_mse", "--epochs", "1", "--run", str(toy_run)]

    whole = write(tmp_path / "whole.trec", lambda query_id, hit: True)
    assert main(arguments(tmp_path / "mine", *whole, adapter="soft_prompt")) == 0
    assert "score of --teacher" not in capsys.readouterr().err
    some = write(tmp_path / "some.trec", lambda query_id, hit: query_id != "q2" or hit.passage_id in qrels["q2"])
    assert main(arguments(tmp_path / "mine", *some, adapter="soft_prompt")) == 0
    missing = len(run["q2"].hits) - 1
    assert f"note: {missing} negatives have no score of --teacher, and get its lowest" in capsys.readouterr().err
    none = write(tmp_path / "none.trec", lambda query_id, hit: query_id != "q4" or hit.passage_id not in qrels["q4"])
    words = ["none.trec: no score for positives of 1 of 6 queries, first query 'q4', passage 'sea-0'"]
    fails(arguments(tmp_path / "other", *none, adapter="soft_prompt"), capsys, tmp_path, *words)


def test_what_a_teacher_only_carries_along_is_no_score(arguments, toy_run, tmp_path, capsys):
    teacher = shutil.copy(toy_run, tmp_path / "teacher.trec")

    def made_with(**options):
        write_provenance(Path(teacher), provenance(command="rerank", options=options))
        return ["--teacher", str(teacher), "--loss", "margin_mse", "--epochs", "1", "--run", str(toy_run)]

    cascade = made_with(method="cascade", depth=100)
    fails(arguments(tmp_path / "mine", *cascade, adapter="soft_prompt"), capsys, tmp_path, "scores the best candidates")
    unscored = "negatives have no score of --teacher, and get its lowest"
    for name, depth in ("whole", 100), ("shallow", 1):  # each query's positive comes first
        shallow = made_with(method="query_likelihood", depth=depth)
        assert main(arguments(tmp_path / name, *shallow, adapter="soft_prompt")) == 0
        assert (unscored in capsys.readouterr().err) == (depth == 1)


def test_dev_queries_without_a_relevant_candidate(arguments, tmp_path, capsys):
    (tmp_path / "dev.trec").write_text("q1 Q0 king-0 1 2.0 t\nq2 Q0 sea-0 1 1.0 t\n")
    given = ["--dev-run", str(tmp_path / "dev.trec")]
    words = ["dev.trec: no query of split 'dev' has a relevant passage among its first 6"]
    fails(arguments(tmp_path / "mine", *given), capsys, tmp_path, *words)


def test_training_without_dev_says_so(arguments, collection, tmp_path, capsys):
    folder = tmp_path / "collection"
    shutil.copytree(collection, folder)
    (folder / "qrels" / "dev.tsv").write_text("query-id\tcorpus-id\tscore\nq3\tking-1\t1\n")
    assert main(arguments(tmp_path / "mine", data=["--collection", str(folder)])) == 0
    said = capsys.readouterr().err
    assert said.count("no query of split 'dev' has a relevant passage among its first 6 of BM25") == 1
    assert json.loads((tmp_path / "mine" / "provenance.json").read_text())["dev"] is None


def test_dev_queries_are_looked_for_until_there_are_enough(arguments, collection, tmp_path):
    """BM25 searches for some after others; whichever alone has a relevant candidate is found."""
    header, *lines = (collection / "qrels" / "dev.tsv").read_text().splitlines()
    for usable in ("q1", "q2", "q3", "q4", "q5", "q6"):
        folder, output = tmp_path / f"of-{usable}", tmp_path / usable
        shutil.copytree(collection, folder)
        kept = [line if line.startswith(f"{usable}\t") else f"{line.split()[0]}\tno-passage\t1" for line in lines]
        (folder / "qrels" / "dev.tsv").write_text("\n".join([header, *kept]) + "\n")
        more = ["--dev-queries", "1", "--epochs", "0"]
        assert main(arguments(output, *more, adapter="soft_prompt", data=["--collection", str(folder)])) == 0
        assert json.loads((output / "provenance.json").read_text())["dev"]["queries"] == 1


def test_logs_of_trackers_stay(arguments, tmp_path, monkeypatch):
    class Tracker(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            logs = Path(args.output_dir) / "runs" / "now"
            logs.mkdir(parents=True)
            (logs / "events").write_text("logged")

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tensorboard", Tracker)
    assert main(arguments(tmp_path / "mine", "--report-to", "tensorboard", adapter="soft_prompt")) == 0
    left = tmp_path / "mine.checkpoints"
    assert [path.name for path in left.iterdir()] == ["runs"]
    assert (left / "runs" / "now" / "events").read_text() == "logged"


def test_shuffled_hint_queries_are_read_in_training_and_on_dev(arguments, tmp_path, monkeypatch):
    seen, rows = [], Prompt.rows

    def watched(self, query, passage, **options):
        other = options.get("hint_query")
        seen.append((query.id, other and other.id))
        return rows(self, query, passage, **options)

    def measured(name, *more):
        seen.clear()
        assert main(arguments(tmp_path / name, "--seed", "2", *more)) == 0
        return json.loads((tmp_path / name / "provenance.json").read_text())

    with monkeypatch.context() as patch:
        patch.setattr(Prompt, "rows", watched)
        own = measured("own")
        assert {read for _, read in seen} == {None}
        shuffled = measured("shuffled", "--hint-queries", "shuffled")
        pairs = {pair for pair in seen if pair[1]}
        assert {query for query, _ in pairs} == {read for _, read in pairs} == {f"q{i}" for i in range(1, 7)}
        assert len(seen) > 100
        assert all(query != read for query, read in seen)
    assert (own["options"]["hint_queries"], shuffled["options"]["hint_queries"]) == ("own", "shuffled")
    assert (tmp_path / "own" / WEIGHTS).read_bytes() != (tmp_path / "shuffled" / WEIGHTS).read_bytes()
    assert own["dev"]["zero_shot"] == shuffled["dev"]["zero_shot"]


def test_shuffled_hint_queries_need_hints_and_queries(arguments, train_file, tmp_path, capsys):
    shuffled = ["--hint-queries", "shuffled"]
    words = ["--hint-queries shuffled is for --method query_likelihood"]
    fails(arguments(tmp_path / "mine", *shuffled, "--method", "yes_no"), capsys, tmp_path, *words)
    train_file.write_text(json.dumps(GROUPS[0]) + "\n")
    command = arguments(tmp_path / "mine", *shuffled, data=["--train-file", str(train_file)])
    fails(command, capsys, tmp_path, "--hint-queries shuffled needs two queries")
    command = ["train", "--adapter", "lora", "--train-file", str(train_file), "--output", str(tmp_path / "mine")]
    train_file.write_text("".join(json.dumps(group) + "\n" for group in GROUPS))
    model = command_model(arguments(tmp_path / "mine"))
    fails([*command, *shuffled, *model], capsys, tmp_path, "--hint-queries: this adapter writes no hints")


def command_model(command):
    """Return the model's options of a command."""
    return command[command.index("--model") : command.index("--model") + 4]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--split", "train"], ["--split: --train-file has"]),
        (["--run", "some.trec"], ["--run: --train-file has"]),
        (["--negative-depth", "50"], ["--negative-depth: --train-file has"]),
        (["--dev-run", "some.trec"], ["--dev-run needs --collection"]),
        (["--patience", "1"], ["--patience needs --collection"]),
        (["--teacher", "some.trec"], ["--teacher: --loss both has none; take margin_mse or plackett_luce"]),
        (
            ["--teacher", "some.trec", "--loss", "margin_mse", "--in-batch"],
            ["--teacher: it has no scores for passages of other queries; give --in-batch false"],
        ),
    ],
)
def test_options_that_would_have_no_effect(arguments, train_file, tmp_path, capsys, more, words):
    fails(arguments(tmp_path / "mine", *more, data=["--train-file", str(train_file)]), capsys, tmp_path, *words)


def test_defaults_that_hang_on_others_are_kept(arguments, tmp_path):
    assert main(arguments(tmp_path / "mine", "--epochs", "0")) == 0
    options = json.loads((tmp_path / "mine" / "provenance.json").read_text())["options"]
    assert (options["split"], options["negative_depth"]) == ("train", 50)


def test_negatives_and_dev_candidates_from_runs(arguments, toy_run, tmp_path):
    run = read_run(toy_run)
    write_run(Run((Ranking(q, r.hits[:3]) for q, r in list(run.items())[:2]), "short"), tmp_path / "dev.trec")
    more = ["--run", str(toy_run), "--dev-run", str(tmp_path / "dev.trec"), "--epochs", "0"]
    assert main(arguments(tmp_path / "mine", *more)) == 0
    facts = json.loads((tmp_path / "mine" / "provenance.json").read_text())
    assert facts["dev"]["queries"] == 2
    assert set(facts["files"]) == {"run", "dev_run"}
    assert facts["history"] == []


def test_the_preset_authors(collection, saved_model, tmp_path):
    command = ["train", "--preset", "authors", "--adapter", "qpeft_r", "--collection", str(collection), "--epochs", "1"]
    assert main([*command, "--model", str(saved_model), "--dtype", "float32", "--output", str(tmp_path / "mine")]) == 0
    described = read_config(tmp_path / "mine")
    assert described["template"]["name"] == "qpeft_authors"
    assert described["options"]["token_table"] == "trainable"


def test_a_report(arguments, tmp_path):
    assert main(arguments(tmp_path / "mine", "--report", adapter="soft_prompt")) == 0
    assert (tmp_path / "mine" / "training.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("adapter", "more", "words"),
    [
        ("qpeft_r", ["--k", "0"], ["--k is 0; it must be at least 1"]),
        ("qpeft_a", ["--attn-dim", "64"], ["--attn-dim 64", "at most 32"]),
        ("qpeft_c", ["--layer", "9"], ["--layer is 9; the model has 2 layers"]),
        ("soft_prompt", ["--preset", "authors"], ["--adapter soft_prompt has no preset 'authors'"]),
        ("soft_prompt", ["--preset", "author"], ["unknown preset", "did you mean 'authors'"]),
        ("soft_prompt", ["--k", "3"], ["unknown option --k"]),
        ("soft_prompt", ["--template", "plian"], ["did you mean 'plain'"]),
        ("soft_prompt", ["--max-length", "14"], ["query '", "leaves no room for a passage", "the limit is 14"]),
        ("soft_prompt", ["--batch-queries", "0"], ["--batch-queries is 0"]),
        ("soft_prompt", ["--learning-rate", "-1"], ["--learning-rate is -1.0"]),
        ("soft_prompt", ["--loss", "margin_mse"], ["'margin_mse' learns from a teacher"]),
        ("soft_prompt", ["--loss", "hinge"], ["loss", "hinge"]),
        ("soft_prompt", ["--teacher", "nowhere.trec", "--loss", "margin_mse"], ["nowhere.trec"]),
        ("soft_prompt", ["--report-to", "tensorbord"], ["--report-to tensorbord", "did you mean 'tensorboard'"]),
        ("soft_prompt", ["--measure", "nDGC@10"], ["nDGC", "did you mean 'nDCG'"]),
        ("soft_prompt", ["--measure", "RR@10 R@5"], ["one measure decides"]),
        ("soft_prompt", ["--split", "trian"], ["trian"]),
        ("soft_prompt", ["--train-queries", "0"], ["queries is 0"]),
        ("soft_prompt", ["--dev-depth", "0"], ["dev-depth is 0"]),
        ("soft_prompt", ["--dev-queries", "0"], ["dev-queries is 0"]),
        ("soft_prompt", ["--max-passage-tokens", "0"], ["max-passage-tokens is 0"]),
        ("soft_prompt", ["--output", "."], ["--output .: it must name a folder"]),
        ("soft_prompt", ["--loss", "pair", "--negatives", "0"], ["--loss pair: it compares passages"]),
    ],
)
def test_bad_options(arguments, tmp_path, capsys, adapter, more, words):
    fails(arguments(tmp_path / "mine", *more, adapter=adapter), capsys, tmp_path, *words)


def test_unknown_adapters(arguments, tmp_path, capsys):
    command = arguments(tmp_path / "mine")
    command[command.index("qpeft_a")] = "qpeft_q"
    fails(command, capsys, tmp_path, "unknown adapter 'qpeft_q'", "did you mean 'qpeft_")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"query": "who", "pos": []}, ["train.jsonl:4", "no positive"]),
        ({"query": " ", "pos": ["the sky"]}, ["train.jsonl:4", "query is empty"]),
        ({"query": "who"}, ["train.jsonl:4"]),
    ],
)
def test_bad_files_of_groups(arguments, train_file, tmp_path, capsys, line, words):
    with train_file.open("a") as file:
        file.write(json.dumps(line) + "\n")
    fails(arguments(tmp_path / "mine", data=["--train-file", str(train_file)]), capsys, tmp_path, *words)


def test_no_data_and_no_positives(arguments, collection, tmp_path, capsys):
    fails(arguments(tmp_path / "mine", data=["--seed", "1"]), capsys, tmp_path, "--collection", "--train-file")
    lonely = tmp_path / "lonely"
    shutil.copytree(collection, lonely)
    (lonely / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\nq1\tsky-0\t0\n")
    command = arguments(tmp_path / "mine", data=["--collection", str(lonely)])
    fails(command, capsys, tmp_path, "no query of split 'train' has a relevant passage")


def test_a_template_without_a_place_for_a_hint(arguments, tmp_path, capsys):
    path = tmp_path / "bare.yaml"
    path.write_text('name: bare\nversion: 1\ncontext: "{passage}"\ntarget: "Question: {query}"\n')
    fails(arguments(tmp_path / "mine", "--template", str(path)), capsys, tmp_path, "'bare' has no place for a hint")


def test_states_need_the_hint_after_the_passage(arguments, tmp_path, capsys):
    path = tmp_path / "before.yaml"
    path.write_text('name: before\nversion: 1\ncontext: "a {hint} passage: {passage}"\ntarget: "question: {query}"\n')
    command = arguments(tmp_path / "mine", "--template", str(path), adapter="qpeft_c")
    fails(command, capsys, tmp_path, "needs its hint after the passage")
    assert main(arguments(tmp_path / "mine", "--template", str(path), "--epochs", "1")) == 0


def test_what_stands_in_the_way(arguments, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    fails(arguments(tmp_path / "mine"), capsys, tmp_path, "mine exists and is no adapter folder")


def test_an_adapter_of_another_model(arguments, rerank_arguments, saved_model, tmp_path, capsys):
    output = tmp_path / "mine"
    assert main(arguments(output, "--epochs", "0")) == 0
    described = json.loads((output / "adapter_config.json").read_text())
    described["base"]["sha256"] = "0" * 64
    (output / "adapter_config.json").write_text(json.dumps(described))
    command = rerank_arguments(tmp_path / "ql.trec", "--adapter", str(output))
    fails(command, capsys, tmp_path, "was trained for", "with weights 000000000000", str(saved_model))
    fails([*command[:-1], str(tmp_path)], capsys, tmp_path, "no adapter in")


def test_contexts_that_do_not_all_fit_are_encoded_every_time(arguments, tmp_path, capsys):
    folders = {cache: tmp_path / cache for cache in ("1", "0.0000001", "0")}
    for cache, folder in folders.items():
        assert main(arguments(folder, "--passage-cache", cache)) == 0
        told = "encoded contexts would take about 0.0 GiB" in capsys.readouterr().err
        assert told == (cache == "0.0000001")
    kept, encoded, whole = (load_file(folder / WEIGHTS) for folder in folders.values())
    for name, tensor in kept.items():
        torch.testing.assert_close(encoded[name], tensor, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(whole[name], tensor, atol=1e-3, rtol=1e-3)


def test_models_that_remember_more_than_the_cache_keeps_are_trained_on_whole_rows(arguments, tmp_path, capsys):
    model = save_odd("lfm2", tmp_path / "lfm2")
    assert main(arguments(tmp_path / "mine", "--model", model)) == 0
    assert "rows go through it whole" in capsys.readouterr().err
    command = arguments(tmp_path / "other", "--model", model, "--passage-cache", "1")
    fails(command, capsys, tmp_path, "the passage cache is for models whose layers are all attention")


def test_a_hint_before_everything(arguments, tmp_path):
    build_family("llama").save_pretrained(tmp_path / "model")
    byte_level_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "first.yaml").write_text(
        'name: first\nversion: 0\ncontext: "{hint}Passage: {passage}\\n"\ntarget: "{query}"\n'
    )
    more = ["--model", str(tmp_path / "model"), "--template", str(tmp_path / "first.yaml")]
    assert main(arguments(tmp_path / "mine", *more, adapter="soft_prompt")) == 0
    assert (tmp_path / "mine" / WEIGHTS).is_file()


def test_a_training_that_is_refused_leaves_the_mark_of_the_other(tmp_path):
    checkpoints = tmp_path / "mine.checkpoints"
    with claim(checkpoints, {"options": "one"}):
        with (
            pytest.raises(StateError, match="another process is working on it"),
            claim(checkpoints, {"options": "two"}),
        ):
            pass
        (checkpoints / "checkpoint-1").mkdir()
    assert read_mark(checkpoints) == {"options": "one"}
    with (
        pytest.raises(StateError, match=r"was made with other options, data or model \(options\)"),
        claim(checkpoints, {"options": "two"}),
    ):
        pass
