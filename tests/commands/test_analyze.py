import json
import shutil
import signal
import time

import numpy as np
import pytest
import torch

from qpeft.adapters import lora
from qpeft.adapters._folder import load_adapter, save_adapter
from qpeft.adapters._lora_targets import Place
from qpeft.analysis.study import Study
from qpeft.cli import main
from qpeft.commands._study import RESULT, UNFINISHED
from qpeft.data.collection import open_collection
from qpeft.data.trec import read_run
from qpeft.evaluation.measures import evaluate
from qpeft.loading import load_lm
from qpeft.model_config import ModelConfig
from qpeft.template import load_template
from qpeft.training import trainer  # noqa: F401  (its import is slow, and not what a test should time)


@pytest.fixture(scope="module")
def adapters(saved_model, tmp_path_factory):
    """Return folders of LoRA adapters for the toy model, by name; none is a copy of another."""
    root = tmp_path_factory.mktemp("adapters")
    made = {
        "all-1": {"r": 2}, "all-2": {"r": 2}, "attention": {"r": 2, "modules": "attention"},
        "mlp": {"r": 2, "modules": "mlp"}, "rank-1": {"r": 1}, "rank-4": {"r": 4},
        "steps/step-000000": {"r": 2}, "steps/step-000010": {"r": 2}, "steps/step-000020": {"r": 2},
        "alpha": {"r": 2, "alpha": 3}, "short": {"r": 2}, "pair": {"r": 2}, "both-1": {"r": 2}, "both-2": {"r": 2},
    }  # fmt: skip
    for seed, (name, options) in enumerate(made.items()):
        lm = load_lm(ModelConfig(str(saved_model), dtype="float32"))
        torch.manual_seed(seed)
        adapter = lora.build(lora.Config(**options), lm)
        if name != "steps/step-000000":
            with torch.no_grad():
                for parameter in adapter.parameters():
                    parameter.copy_(torch.randn_like(parameter) * 0.1)
        facts = {"options": {"seed": seed} | ({"loss": name[:4]} if name[:4] in ("pair", "both") else {})}
        length = 5 if name == "short" else None
        template = load_template("plain")
        save_adapter(root / name, "lora", adapter, lm, template, max_passage_tokens=length, provenance=facts)
    own = {"yes": "new", "no": "old"}
    save_adapter(root / "yes-no", "lora", adapter, lm, load_template("yes_no"), method="yes_no", method_options=own)
    return root


@pytest.fixture
def arguments(toy, toy_run, saved_model, adapters, tmp_path):
    """Return a function that makes the arguments of a study."""

    def make(study, *names, more=(), output=None):
        return [
            "analyze", study, *(part for name in names for part in ("--adapter", str(adapters / name))),
            "--collection", str(toy), "--run", str(toy_run), "--model", str(saved_model), "--dtype", "float32",
            "--measure", "RR@5", "--depth", "6", "--output", str(output or tmp_path / study), *more,
        ]  # fmt: skip

    return make


def result(folder):
    return Study.from_dict(json.loads((folder / RESULT).read_text()))


def per_query(run, toy):
    ((_, values),) = evaluate(run, open_collection(str(toy)).qrels("test"), "RR@5").per_query.items()
    return [values[query] for query in run]


def test_a_study_of_layers_agrees_with_rerank(arguments, rerank_arguments, adapters, toy, tmp_path, capsys):
    """All additions and none are what rerank gives; a layer without them is an adapter whose weights there are zero."""
    assert main(arguments("layers", "all-1", more=["--window", "1"])) == 0
    found = result(tmp_path / "layers")
    assert "12 lines" in capsys.readouterr().err
    expected = {}
    for name, more in (
        ("all additions", ["--adapter", str(adapters / "all-1")]),
        ("no additions", []),
        ("layer 2", ["--adapter", str(halved(adapters / "all-1", 0, tmp_path))]),
    ):
        output = tmp_path / f"{name}.trec"
        assert main(rerank_arguments(output, "--depth", "6", *more)) == 0
        expected[name] = read_run(output)
    for name, run in expected.items():
        assert list(found.queries) == list(run)
        assert found.find(name).per_query == pytest.approx(per_query(run, toy), abs=1e-6)
    assert len({found.find(name).per_query for name in expected}) == 3, "they differ"
    assert found.find("without layer 1").per_query == found.find("layer 2").per_query
    assert found.work["layers_run"] < found.work["layers_without_sharing"]
    assert {path.name for path in (tmp_path / "layers").iterdir()} >= {"report.html", "summary.md", "layers.png"}
    assert not (tmp_path / "layers" / UNFINISHED).exists()


def halved(folder, layer, tmp_path):
    """Return the folder of a copy whose additions of one layer are zero."""
    described = json.loads((folder / "qpeft.json").read_text())
    lm = load_lm(ModelConfig(described["base"]["name"], dtype="float32"))
    opened = load_adapter(folder, lm)
    with torch.no_grad():
        for name, parameter in opened.adapter.named_parameters():
            if f".layers.{layer}." in name and "lora_B" in name:
                parameter.zero_()
    save_adapter(tmp_path / "halved", "lora", opened.adapter, lm, opened.template)
    return tmp_path / "halved"


def test_seeds_are_averaged(arguments, tmp_path):
    for name in ("all-1", "all-2"):
        assert main(arguments("projections", name, output=tmp_path / name)) == 0
    assert main(arguments("projections", "all-1", "all-2", more=["--grid"])) == 0
    one, two, both = result(tmp_path / "all-1"), result(tmp_path / "all-2"), result(tmp_path / "projections")
    for each in one.findings:
        pair = each.per_query, two.find(each.name).per_query
        assert both.find(each.name).per_query == pytest.approx(np.mean(pair, axis=0), abs=1e-5)
    assert [subject["seed"] for subject in both.subjects] == [0, 1]
    assert len(both.of("grid, one alone")) == 2 * 7
    assert (tmp_path / "projections" / "grid.svg").is_file()


def test_without_additions_the_model_is_ranked_once(arguments, adapters, saved_model, tmp_path, monkeypatch):
    """Unless an adapter has more than additions, which go on acting: then it is ranked with those alone."""
    lm = load_lm(ModelConfig(str(saved_model), dtype="float32"))
    more = []
    for seed in (9, 10):
        torch.manual_seed(seed)
        adapter = lora.build(lora.Config(r=8, hint="soft_prompt"), lm)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.1)
        save_adapter(tmp_path / f"hinted-{seed}", "lora", adapter, lm, load_template("plain"))
        adapter.withdraw()
        more += ["--adapter", str(tmp_path / f"hinted-{seed}")]

    def sets():
        found = {}
        for line in map(json.loads, (tmp_path / "ranks" / UNFINISHED).read_text().splitlines()[1:]):
            found.setdefault(line["adapter"], set()).add(len(line["scores"]))
        return found

    with monkeypatch.context() as patch:
        patch.setattr("qpeft.analysis.study_report.write_study", interrupted)
        assert main(arguments("ranks", "rank-1", "rank-4", more=more)) == 130
    assert sets() == {0: {1}, 1: {1}, 2: {2}, 3: {2}}, "M(0) is that of the highest rank"
    assert main(arguments("ranks", "rank-1", "rank-4", more=[*more, "--resume"])) == 0
    hinted = result(tmp_path / "ranks").find("no additions").per_query
    shutil.rmtree(tmp_path / "ranks")
    with monkeypatch.context() as patch:
        patch.setattr("qpeft.analysis.study_report.write_study", interrupted)
        assert main(arguments("ranks", "rank-1", "all-1", "all-2")) == 130
    assert sets() == {0: {1}, 1: {2}, 2: {1}}
    assert main(arguments("ranks", "rank-1", "all-1", "all-2", more=["--resume"])) == 0
    assert result(tmp_path / "ranks").find("no additions").per_query != hinted, "the hint goes on acting"


def test_components_ranks_losses_and_checkpoints(arguments, tmp_path):
    assert main(arguments("components", "attention", "all-1", "mlp", "all-2")) == 0
    found = result(tmp_path / "components")
    assert found.full == "trained: both, rank 2"
    assert found.find(found.full).adapters == (1, 3)
    parts = [found.find(f"trained: {name}, rank 2").parameters for name in ("attention", "mlp")]
    assert sum(parts) == found.find(found.full).parameters
    assert found.find("mlp of both").parameters == parts[1]
    assert found.find("mlp of both").per_query != found.find("trained: mlp, rank 2").per_query

    assert main(arguments("ranks", "rank-4", "rank-1", "all-1")) == 0
    found = result(tmp_path / "ranks")
    assert [each.name for each in found.findings] == ["rank 1", "rank 2", "rank 4", "no additions"]

    assert main(arguments("losses", "both-1", "pair", "both-2")) == 0
    found = result(tmp_path / "losses")
    assert [(each.name, each.adapters) for each in found.of("loss")] == [("loss pair", (1,)), ("loss both", (0, 2))]
    assert (found.full, found.find("no additions").adapters) == ("loss both", (0, 2))
    assert {subject["loss"] for subject in found.subjects} == {"both", "pair"}

    assert main(arguments("checkpoints", "steps")) == 0
    found = result(tmp_path / "checkpoints")
    assert [each.x for each in found.of("step")] == [0, 10, 20]
    assert found.find("step 0").per_query == found.find("no additions").per_query, "the additions begin at zero"
    assert found.find("step 10").per_query != found.find("step 20").per_query


def test_states_that_training_kept(toy, toy_run, saved_model, tmp_path):
    """From `train --keep-every` to the study, with a score head."""
    where = ["--collection", str(toy), "--model", str(saved_model), "--dtype", "float32"]
    output = tmp_path / "head"
    training = ["--method", "classifier", "--train-file", str(groups(toy, tmp_path)), "--epochs", "2", "--r", "1"]
    training += ["--batch-queries", "2", "--learning-rate", "0.05", "--dev-queries", "6", "--seed", "5"]
    training += ["--keep-every", "2", "--output", str(output)]
    assert main(["train", "--adapter", "lora", *where, *training]) == 0
    study = ["--adapter", f"{output}.steps", "--run", str(toy_run), "--measure", "RR@5"]
    assert main(["analyze", "checkpoints", *where, *study, "--output", str(tmp_path / "s")]) == 0
    found = result(tmp_path / "s")
    assert [each.x for each in found.of("step")] == [0, 2, 4, 6]
    assert {(subject["seed"], subject["method"]) for subject in found.subjects} == {(5, "classifier")}
    assert {subject["loss"] for subject in found.subjects} == {"softmax"}
    none, untrained = found.find("no additions"), found.find("step 0")
    assert untrained.mean == pytest.approx(none.mean + untrained.gain)
    assert untrained.per_query != none.per_query, "M(0) has the head of the last state"


def groups(toy, folder):
    """Write groups to train on, one for each query of the toy collection."""
    collection = open_collection(str(toy))
    texts, qrels = collection.passages, collection.qrels("dev")
    lines = [
        {
            "query": query.text,
            "pos": [texts[passage].text for passage in qrels[query.id]],
            "neg": [texts["octopus-1"].text, texts["king-2"].text],
        }
        for query in collection.queries("dev").values()
    ]
    path = folder / "groups.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def kill_midway(process, partial):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if partial.exists() and partial.read_text().count("\n") > 2:
            process.send_signal(signal.SIGKILL)
            process.wait()
            return
        time.sleep(0.01)
    raise AssertionError("the process ended, or did not get so far")


def test_a_killed_study_goes_on(arguments, tmp_path, start_process, capsys):
    """As a child process, so that the kill is real."""
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    more = ["--window", "1"]
    assert main(arguments("layers", "all-1", "all-2", more=more, output=straight)) == 0
    process = start_process(arguments("layers", "all-1", "all-2", more=more, output=killed))
    kill_midway(process, killed / UNFINISHED)
    assert not (killed / RESULT).exists()
    done = (killed / UNFINISHED).read_text().splitlines()

    again = arguments("layers", "all-1", "all-2", more=more, output=killed)
    assert main(again) == 2
    assert "is an unfinished study" in capsys.readouterr().err
    for changed, named in (
        (["--depth", "5"], "(--depth was 6 and is 5)"),
        (["--measure", "RR@3"], '(--measure was "RR@5" and is "RR@3")'),
        (["--seed", "1"], "(--seed was 0 and is 1)"),
    ):
        assert main([*again, *changed, "--resume"]) == 2
        assert f"made with other options, data or model {named}" in capsys.readouterr().err
    other = arguments("layers", "all-2", "all-1", more=more, output=killed)
    assert main([*other, "--resume"]) == 2
    assert (killed / UNFINISHED).read_text().splitlines()[: len(done)] == done

    with (killed / UNFINISHED).open("a") as file:
        file.write('{"adapter": 0, "quer')  # as if it had been killed while writing
    assert main([*again, "--resume"]) == 0
    assert result(killed).findings == result(straight).findings
    assert result(killed).work == result(straight).work

    before = (killed / RESULT).stat().st_mtime_ns
    assert main([*again, "--resume"]) == 0
    assert f"{killed}: finished before" in capsys.readouterr().err
    assert (killed / RESULT).stat().st_mtime_ns == before
    assert main([*again, "--measure", "RR@3", "--resume"]) == 0
    assert result(killed).measure == "RR@3"


def test_nothing_is_computed_twice(arguments, tmp_path, monkeypatch):
    """What stands in the unfinished file is taken as it is."""
    output = tmp_path / "out"
    again = arguments("layers", "all-1", "all-2", more=["--window", "1"], output=output)
    with monkeypatch.context() as patch:
        patch.setattr("qpeft.analysis.study_report.write_study", interrupted)
        assert main(again) == 130
    lines = (output / UNFINISHED).read_text().splitlines()
    assert len(lines) == 1 + 2 * 6
    header, *rest = map(json.loads, lines)
    for line in rest[:8]:
        line["scores"] = [[float(-i) for i, _ in enumerate(scores)] for scores in line["scores"]]
    kept = [json.dumps(line) + "\n" for line in (header, *rest[:8])]
    (output / UNFINISHED).write_text("".join(kept))
    assert main([*again, "--resume"]) == 0
    found = result(output)
    assert found.find("all additions").means[0] == found.find("no additions").means[0], "those written into the file"
    assert found.find("all additions").means[1] != found.find("no additions").means[1]


def test_another_adapter_under_the_same_name_is_noticed(arguments, adapters, tmp_path, monkeypatch, capsys):
    shutil.copytree(adapters / "all-1", tmp_path / "mine")
    again = arguments("projections", more=["--adapter", str(tmp_path / "mine")])
    with monkeypatch.context() as patch:
        patch.setattr("qpeft.analysis.study_report.write_study", interrupted)
        assert main(again) == 130
    shutil.copy(adapters / "all-2" / "adapter_model.safetensors", tmp_path / "mine")
    assert main([*again, "--resume"]) == 2
    assert "made with other options, data or model (adapters.0.sha256)" in capsys.readouterr().err


def interrupted(*_):
    raise KeyboardInterrupt


def test_a_finished_study_is_replaced_and_nothing_else(arguments, tmp_path, capsys):
    output = tmp_path / "out"
    once = arguments("layers", "all-1", more=["--window", "1", "--limit-queries", "2"], output=output)
    assert main(once) == 0
    assert len(result(output).queries) == 2
    assert main([*once, "--seed", "3", "--limit-queries", "3"]) == 0
    assert len(result(output).queries) == 3
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("all of it")
    assert main(arguments("layers", "all-1", more=["--window", "1"], output=tmp_path / "mine")) == 2
    assert "exists and is no folder of a study" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("study", "names", "more", "words"),
    [
        ("layers", ["all-1"], [], ["--window is 4", "2 layers"]),
        ("layers", ["all-1", "mlp"], ["--window", "1"], ["mlp has additions at other places"]),
        ("layers", ["nowhere"], [], ["no adapter", "nowhere"]),
        ("layers", ["steps"], [], ["adapter_config.json is missing"]),
        ("projections", ["all-1"], ["--measure", "RR@5 P@5"], ["one measure is compared, not 2"]),
        ("projections", ["all-1"], ["--measure", "RRR@5"], ["RRR"]),
        ("projections", ["all-1"], ["--measure", "CandR_clean@5"], ["not every query has a value; take CandR@5"]),
        ("projections", ["all-1"], ["--depth", "0"], ["--depth is 0"]),
        ("projections", ["all-1"], ["--limit-queries", "0"], ["--limit-queries is 0"]),
        ("projections", ["all-1"], ["--split", "tset"], ["tset"]),
        ("projections", ["all-1"], ["--windw", "1"], ["unknown option --windw"]),
        ("components", ["mlp"], [], ["trained with both components", "ranks: none"]),
        ("ranks", ["all-1", "all-2"], [], ["all adapters have rank 2"]),
        ("checkpoints", ["all-1"], [], ["all-1: no folders of steps"]),
        ("ranks", ["rank-1", "yes-no"], [], ["yes-no has another method than", "rank-1", "not comparable"]),
        ("layers", ["all-1", "rank-4"], ["--window", "1"], ["rank-4 has another rank than", "all-1"]),
        ("layers", ["all-1", "alpha"], ["--window", "1"], ["alpha has another scale (alpha / rank) than", "all-1"]),
        ("layers", ["all-1", "short"], ["--window", "1"], ["short has another template, answers or passage length"]),
        ("layers", ["all-1", "all-1"], ["--window", "1"], ["all-1 has the weights of", "give each adapter once"]),
        ("losses", ["all-1", "pair"], [], ["losses: ", "all-1 does not say with which loss"]),
    ],
)
def test_bad_input(arguments, tmp_path, capsys, study, names, more, words):
    assert main(arguments(study, *names, more=more)) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words)
    assert not (tmp_path / study).exists()


def test_only_lora_is_studied(arguments, saved_model, adapters, tmp_path, capsys):
    lm = load_lm(ModelConfig(str(saved_model), dtype="float32"))
    from qpeft.adapters import soft_prompt

    adapter = soft_prompt.build(soft_prompt.Config(length=2), lm)
    save_adapter(tmp_path / "prompt", "soft_prompt", adapter, lm, load_template("plain"))
    more = ["--adapter", str(tmp_path / "prompt")]
    assert main(arguments("projections", more=more)) == 2
    assert "soft_prompt has no additions to layers" in capsys.readouterr().err


def test_verbs_of_analyze(capsys):
    assert main(["analyze"]) == 2
    assert "analyze layers" in capsys.readouterr().err
    assert main(["analyze", "layres"]) == 2


def test_places_are_those_of_the_model(adapters, saved_model):
    opened = load_adapter(adapters / "mlp", load_lm(ModelConfig(str(saved_model), dtype="float32")))
    assert Place(0, "gate", "mlp") in opened.adapter.places()
