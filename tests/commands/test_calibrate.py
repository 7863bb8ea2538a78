"""`qpeft calibrate`: from a reranked dev run to a calibration that knows what it belongs to."""

import json
import os
import shutil

import matplotlib.image
import numpy as np
import pytest

from qpeft.adapters import soft_prompt
from qpeft.adapters._folder import load_adapter, save_adapter
from qpeft.cli import main
from qpeft.data.records import read_json
from qpeft.data.trec import read_run
from qpeft.errors import AdapterError
from qpeft.evaluation.calibration import fit, judged_pairs
from qpeft.evaluation.calibration_file import read_calibration
from qpeft.loading import load_lm
from qpeft.model_config import ModelConfig
from qpeft.provenance import write_provenance
from qpeft.template import load_template


@pytest.fixture(scope="module")
def adapter(saved_model, tmp_path_factory):
    """Return the folder of an adapter for the tiny model."""
    folder = tmp_path_factory.mktemp("adapters") / "mine"
    lm = load_lm(ModelConfig(str(saved_model), dtype="float32"))
    save_adapter(folder, "soft_prompt", soft_prompt.build(soft_prompt.Config(length=2), lm), lm, load_template("plain"))
    return folder


@pytest.fixture
def own(adapter, tmp_path):
    """Return a copy of the adapter that may be changed."""
    return shutil.copytree(adapter, tmp_path / "mine")


@pytest.fixture(scope="module")
def calibratable(toy, toy_run, saved_model, adapter, tmp_path_factory):
    """Return a collection that judges what the model ranks first or second, and dev runs over it by name."""
    folder = tmp_path_factory.mktemp("calibratable")
    collection = shutil.copytree(toy, folder / "toy")

    def rerank(name, *more):
        arguments = ["rerank", "--collection", str(collection), "--run", str(toy_run), "--split", "dev"]
        model = ["--model", str(saved_model), "--dtype", "float32"]
        assert main([*arguments, *model, "--output", str(folder / f"{name}.trec"), *more]) == 0

    rerank("first")
    rows = [
        f"{query}\t{ranking.hits[i % 2].passage_id}\t1\n"
        for i, (query, ranking) in enumerate(read_run(folder / "first.trec").items())
    ]
    (collection / "qrels" / "dev.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(rows))
    rerank("alone")
    rerank("shallow", "--depth", "4")
    rerank("summed", "--normalize", "sum", "--template", "upr")
    rerank("mixed", "--interpolate", "0.5")
    rerank("adapted", "--adapter", str(adapter))
    rerank("cascade", "--method", "cascade", "--cascade", "6:2", "--cheap", "first_stage")
    return folder


@pytest.fixture
def calibrate(calibratable, capsys):
    """Return a function that calibrates a run and returns (exit code, standard output, standard error)."""

    def run(name, *more):
        arguments = [
            "calibrate",
            "--collection",
            str(calibratable / "toy"),
            "--run",
            str(calibratable / f"{name}.trec"),
        ]
        capsys.readouterr()
        code = main([*arguments, "--folds", "3", *map(str, more)])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


@pytest.mark.parametrize("method", ["platt", "isotonic"])
@pytest.mark.parametrize("centre", [[], ["--centre"]])
def test_a_file_for_the_model_alone(calibrate, calibratable, tmp_path, method, centre):
    output, plot = tmp_path / "c.json", tmp_path / "plot.png"
    code, out, err = calibrate("alone", "--method", method, *centre, "--output", output, "--plot", plot)
    assert code == 0, err
    written = read_calibration(output)
    run = read_run(calibratable / "alone.trec")
    qrels = {query: {} for query in run}
    for line in (calibratable / "toy" / "qrels" / "dev.tsv").read_text().splitlines()[1:]:
        query, passage, grade = line.split("\t")
        qrels[query][passage] = int(grade)
    pairs = judged_pairs(run, qrels)
    used = pairs.centred() if centre else pairs
    assert written.map == fit(method, used.scores, used.relevant)
    assert written.centred == bool(centre)
    assert written.origin.options["normalize"] == "mean"
    assert written.fitted_on["queries"] == written.fitted_on["relevant"] == 6
    assert written.fitted_on["pairs"] == len(pairs.scores)
    assert json.loads((tmp_path / "c.json.provenance.json").read_text())["command"] == "calibrate"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.json", "c.json.provenance.json", "plot.png"]
    assert (method + ", centred" * bool(centre) + " (written)") in out
    assert (
        f"3-fold cross-validation over 6 queries, 6 of them with a relevant candidate: {len(pairs.scores)} pairs" in out
    )
    picture = matplotlib.image.imread(plot)
    assert picture.shape[:2] == (810, 690)
    assert len({tuple(pixel) for pixel in picture.reshape(-1, picture.shape[2])[::7].tolist()}) > 10
    for ranking in run.values():
        values = written([hit.score for hit in ranking.hits])
        assert (np.diff(values) <= 1e-15).all(), "the order is the run's"


def test_made_up_scores_below_the_depth_do_not_count(calibrate, calibratable, tmp_path):
    assert calibrate("shallow", "--output", tmp_path / "c.json")[0] == 0
    ranked = read_run(calibratable / "shallow.trec")
    assert read_calibration(tmp_path / "c.json").fitted_on["pairs"] == sum(min(4, len(r.hits)) for r in ranked.values())


def test_the_same_run_gives_the_same_bytes(calibrate, tmp_path):
    for name in ("a.json", "b.json"):
        assert calibrate("alone", "--output", tmp_path / name)[0] == 0
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_into_the_adapters_folder(calibrate, calibratable, own, saved_model, tmp_path):
    before = {path.name: path.read_bytes() for path in own.iterdir()}
    code, _, err = calibrate("adapted", "--adapter", own)
    assert code == 0, err
    after = {path.name: path.read_bytes() for path in own.iterdir()}
    assert set(after) - set(before) == {"calibration.json"}
    assert all(after[name] == content for name, content in before.items())
    lm = load_lm(ModelConfig(str(saved_model), dtype="float32"))
    opened = load_adapter(own, lm)
    assert opened.calibration == read_calibration(own / "calibration.json")
    assert opened.calibration.origin.adapter == {"name": "soft_prompt", "sha256": opened.sha256}
    assert calibrate("adapted", "--adapter", own, "--method", "isotonic")[0] == 0
    assert load_adapter(own, lm).calibration.method == "isotonic"


def test_an_adapter_with_anothers_calibration_is_refused(calibrate, own, saved_model, tmp_path):
    assert calibrate("adapted", "--adapter", own)[0] == 0
    lm = load_lm(ModelConfig(str(saved_model), dtype="float32"))
    other = soft_prompt.build(soft_prompt.Config(length=3), lm)
    save_adapter(tmp_path / "other", "soft_prompt", other, lm, load_template("plain"))
    assert load_adapter(tmp_path / "other", lm).calibration is None
    shutil.copy(own / "calibration.json", tmp_path / "other")
    with pytest.raises(AdapterError, match=r"other.*fitted on scores of adapter 'soft_prompt' \(\w{12}\), not of"):
        load_adapter(tmp_path / "other", lm)
    config = json.loads((own / "adapter_config.json").read_text())
    config["template"]["target"] = "Query: {query}"
    (own / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match="fitted on scores of template 'plain'"):
        load_adapter(own, lm)
    (own / "calibration.json").write_text("{")
    with pytest.raises(AdapterError, match=r"calibration\.json:1: not JSON"):
        load_adapter(own, lm)


def test_training_again_takes_the_calibration_away(calibrate, own, saved_model):
    assert calibrate("adapted", "--adapter", own)[0] == 0
    lm = load_lm(ModelConfig(str(saved_model), dtype="float32"))
    save_adapter(own, "soft_prompt", load_adapter(own, lm).adapter, lm, load_template("plain"))
    assert not (own / "calibration.json").exists()


def test_options_that_change_scores_are_kept(calibrate, tmp_path):
    assert calibrate("summed", "--output", tmp_path / "c.json")[0] == 0
    origin = read_calibration(tmp_path / "c.json").origin
    assert origin.options["normalize"] == "sum"
    assert origin.template["name"] == "upr"


def test_a_mixed_run_can_be_calibrated_but_belongs_to_no_model(calibrate, own, tmp_path):
    assert calibrate("mixed", "--output", tmp_path / "c.json")[0] == 0
    assert read_calibration(tmp_path / "c.json").origin is None
    code, _, err = calibrate("mixed", "--adapter", own)
    assert (code, "was made with no adapter alone" in err) == (2, True)


def test_what_a_cascade_did_not_score_is_neither_calibrated_nor_mixed(
    calibrate, calibratable, toy_run, tmp_path, capsys
):
    code, _, error = calibrate("cascade", "--output", tmp_path / "c.json")
    assert (code, "cascade.trec was made with --method cascade, which scores" in error) == (2, True)
    run, output = calibratable / "cascade.trec", tmp_path / "mixed.trec"
    mixing = ["interpolate", "--first", str(toy_run), "--run", str(run), "--output", str(output)]
    for more in (["--weight", "0.5"], ["--weight", "0.5", "--depth", "6"]):
        assert main([*mixing, *more]) == 2
        assert "which scores the best candidates only" in capsys.readouterr().err
    mixing = ["interpolate", "--first", str(run), "--run", str(toy_run), "--output", str(output)]
    assert main([*mixing, "--weight", "0.5"]) == 2
    assert "which scores the best candidates only" in capsys.readouterr().err
    assert not output.exists()


def test_what_either_run_did_not_score_is_not_mixed(calibratable, tmp_path):
    output = tmp_path / "mixed.trec"
    alone, shallow = (str(calibratable / f"{name}.trec") for name in ("alone", "shallow"))
    mixing = ["interpolate", "--weight", "0.5", "--output", str(output)]
    for first, run in ((alone, shallow), (shallow, alone)):
        assert main([*mixing, "--first", first, "--run", run]) == 0
        assert read_json(f"{output}.provenance.json")["options"]["depth"] == 4
        below = read_run(first)
        for query, ranking in read_run(output).items():
            assert [hit.passage_id for hit in ranking.hits[4:]] == [hit.passage_id for hit in below[query].hits[4:]]


def test_a_first_stage_that_scored_less_is_not_mixed_in(calibratable, saved_model, tmp_path, capsys):
    output = tmp_path / "mixed.trec"
    reranking = ["rerank", "--collection", str(calibratable / "toy"), "--split", "dev", "--model", str(saved_model)]
    reranking += ["--dtype", "float32", "--interpolate", "0.5", "--output", str(output)]
    assert main([*reranking, "--run", str(calibratable / "shallow.trec")]) == 2
    assert "shallow.trec scores its first 4 only; take --depth 4" in capsys.readouterr().err
    assert main([*reranking, "--run", str(calibratable / "cascade.trec"), "--depth", "2"]) == 2
    assert "which scores the best candidates only" in capsys.readouterr().err
    assert not output.exists()
    assert main([*reranking, "--run", str(calibratable / "shallow.trec"), "--depth", "4"]) == 0


def test_no_run_is_overwritten(calibrate, calibratable, tmp_path, capsys):
    run = shutil.copy(calibratable / "alone.trec", tmp_path / "dev.trec")
    before = run.read_bytes()
    assert calibrate("alone", "--run", run, "--output", run)[0] == 2
    mixing = ["interpolate", "--first", "a", "--run", "b", "--dev-first", "c", "--dev-run", str(run)]
    assert main([*mixing, "--output", str(run)]) == 2
    assert "is what is read, and would be lost" in capsys.readouterr().err
    assert run.read_bytes() == before


def test_provenance_of_another_file_is_not_believed(calibrate, calibratable, toy, tmp_path, capsys):
    run = shutil.copy(calibratable / "shallow.trec", tmp_path / "run.trec")
    beside = shutil.copy(calibratable / "alone.trec.provenance.json", tmp_path / "run.trec.provenance.json")
    says = f"{beside} is not of {run} as it is now"
    code, _, error = calibrate(tmp_path / "run", "--output", tmp_path / "c.json")
    assert (code, says in error) == (2, True)
    judge = ["evaluate", "--collection", str(toy), "--split", "dev", "--run", str(run)]
    assert main([*judge, "--cost"]) == 2
    assert says in capsys.readouterr().err
    assert main(judge) == 0
    os.unlink(run)
    code, _, error = calibrate(tmp_path / "run", "--output", tmp_path / "c.json")
    assert (code, "run.trec" in error, "Traceback" in error) == (2, True, False)


def test_the_wrong_adapter(calibrate, own, tmp_path):
    code, _, err = calibrate("alone", "--adapter", own)
    assert (code, "alone.trec was made with no adapter alone" in err) == (2, True)
    weights = own / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    code, _, err = calibrate("adapted", "--adapter", own)
    assert (code, "is 'soft_prompt' (" in err, "was made with 'soft_prompt' (" in err) == (2, True, True)
    assert not (own / "calibration.json").exists()
    code, _, err = calibrate("adapted", "--adapter", "tiny-lm-qpeft-a")
    assert (code, "tiny-lm-qpeft-a is embedded" in err) == (2, True)
    code, _, err = calibrate("adapted", "--adapter", tmp_path / "nowhere")
    assert (code, "no adapter in" in err) == (2, True)


def test_bad_input_is_one_line(calibrate, calibratable, toy_run, tmp_path):
    output = ["--output", tmp_path / "c.json"]
    lonely = calibratable / "lonely.trec"
    lonely.write_text("q1 Q0 sky-0 1 2.0 t\n")
    os.mkfifo(calibratable / "pipe.trec")
    foreign = shutil.copytree(calibratable / "toy", tmp_path / "foreign")
    (foreign / "qrels" / "dev.tsv").write_text("query-id\tcorpus-id\tscore\nq1\tsky-0\t1\n")
    for name, more, words in (
        ("alone", [], "give either --adapter or --output"),
        ("alone", [*output, "--adapter", "x"], "give either --adapter or --output"),
        ("alone", [*output, "--method", "sigmoid"], "method"),
        ("alone", [*output, "--folds", "7"], "--folds is 7, but only 6 queries have a relevant candidate"),
        ("alone", [*output, "--folds", "1"], "--folds is 1"),
        ("alone", [*output, "--split", "tset"], "'tset'"),
        ("alone", [*output, "--collection", foreign], "which is not"),
        ("nowhere", output, "nowhere.trec"),
        ("lonely", output, "lonely.trec.provenance.json is missing"),
        ("alone", [*output, "--plot", foreign], "is a folder"),
        ("pipe", output, "pipe.trec.provenance.json is missing"),
    ):
        code, out, err = calibrate(name, *more)
        assert code == 2, (name, more)
        (line,) = err.splitlines()
        assert words in line
        assert not out
    assert [path.name for path in tmp_path.iterdir()] == ["foreign"]


def test_a_picture_that_cannot_be_written_takes_nothing_along(calibrate, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = calibrate("alone", "--output", tmp_path / "c.json", "--plot", tmp_path / "file" / "p.png")
    assert (code, "file" in err) == (2, True)
    assert json.loads((tmp_path / "c.json").read_text())


def test_scores_that_say_nothing(calibrate, calibratable, tmp_path):
    """Relevant passages score lowest."""
    turned = calibratable / "turned.trec"
    lines = [line.split() for line in (calibratable / "alone.trec").read_text().splitlines()]
    rows = (calibratable / "toy" / "qrels" / "dev.tsv").read_text().splitlines()
    relevant = {tuple(row.split("\t")[:2]) for row in rows}
    turned.write_text("".join(f"{q} Q0 {p} 1 {-int((q, p) in relevant)} t\n" for q, _, p, *_ in lines))
    write_provenance(turned, read_json(calibratable / "alone.trec.provenance.json"))
    for method in ("platt", "isotonic"):
        code, _, err = calibrate("turned", "--centre", "--method", method, "--output", tmp_path / "c.json")
        assert (code, "turned.trec: relevant passages score no higher than others" in err) == (2, True), method
    assert not list(tmp_path.iterdir())


def test_a_warning_where_it_is_worth_nothing(calibrate, calibratable, toy, tmp_path):
    """Twelve pairs are too few for steps: on queries left out they are worse than the base rate."""
    noisy = calibratable / "noisy.trec"
    rng = np.random.default_rng(0)
    lines = [line.split() for line in (calibratable / "alone.trec").read_text().splitlines()]
    noisy.write_text("".join(f"{q} Q0 {p} {rank} {rng.normal():.4f} t\n" for q, _, p, rank, _, _ in lines))
    write_provenance(noisy, read_json(calibratable / "alone.trec.provenance.json"))
    code, out, err = calibrate("noisy", "--method", "isotonic", "--output", tmp_path / "c.json")
    assert code == 0, err
    assert "warning: isotonic is no better than the base rate on queries that it was not fitted on" in out
