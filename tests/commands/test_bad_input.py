import json
import shutil

import pytest

from qpeft.cli import main
from tiny_models import build_family


def fails(arguments, capsys, folder, *words):
    """Assert exit code 2, one line on standard error that holds the words, and no output."""
    before = sorted(folder.iterdir())
    assert main(arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("qpeft: error:")]
    assert len(lines) == 1
    for word in words:
        assert word in lines[0]
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("q1 Q0 sky-0 1 2.0 t\nq1 Q0 sky-1\n", ["bad.trec:2", "3 columns"]),
        ("q1 Q0 sky-0 1 abc t\n", ["bad.trec:1", "abc"]),
        ("q1 Q0 sky-0 1 nan t\n", ["bad.trec:1"]),
        ("q1 Q0 sky-0 1 2.0 t\nq1 Q0 sky-0 2 1.0 t\n", ["bad.trec:2", "'sky-0' twice"]),
        ("q1 Q0 nowhere 1 2.0 t\n", ["'nowhere' is not in the collection"]),
        ("q99 Q0 sky-0 1 2.0 t\n", ["'q99' is unknown"]),
    ],
)
def test_bad_runs(rerank_arguments, tmp_path, capsys, text, words):
    run = tmp_path / "bad.trec"
    run.write_text(text)
    fails(rerank_arguments(tmp_path / "out.trec", run=run), capsys, tmp_path, *words)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--dpeth", "5"], ["unknown option --dpeth", "did you mean 'depth'"]),
        (["--depth", "many"], ["depth", "many"]),
        (["--depth", "0"], ["--depth is 0"]),
        (["--template", "plian"], ["did you mean 'plain'"]),
        (["--method", "query-likelyhood"], ["unknown method", "query_likelihood"]),
        (["--split", "tset"], ["tset", "test"]),
        (["--max-length", "10"], ["a query is never cut"]),
        (["--device", "gpu7"], ["--device"]),
        (["--normalize", "median"], ["normalize"]),
        (["--config", "nowhere.yaml"], ["nowhere.yaml"]),
        (["--tag", "tiny lm"], ["--tag 'tiny lm'"]),
        (["--interpolate", "30"], ["--interpolate is 30"]),
        (["--batch-tokens", "-5"], ["--batch-tokens is -5"]),
        (["--windows", "8", "--window-overlap", "9"], ["--window-overlap 9"]),
        (["--cheap", "layers=1"], ["unknown option --cheap"]),
        (["--method", "cascade", "--cascade", "20:100"], ["--cascade 20:100"]),
        (["--method", "cascade", "--cheap", "layers=2"], ["has 2 layers; take from 1 to 1"]),
        (["--method", "cascade", "--interpolate", "0.5"], ["--interpolate needs scores of all", "cascade"]),
    ],
)
def test_bad_options(rerank_arguments, tmp_path, capsys, more, words):
    arguments = rerank_arguments(tmp_path / "out.trec")
    fails(arguments + more, capsys, tmp_path, *words)


def test_missing_option_and_unknown_commands(capsys, tmp_path):
    fails(["rerank", "--run", "x"], capsys, tmp_path, "collection")
    fails(["rernak"], capsys, tmp_path, "did you mean 'rerank'")
    fails(["data"], capsys, tmp_path, "data info, data convert")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--depth", "many"], "--depth: 'many' is no whole number"),
        (["--document-prior", "much"], "--document-prior: 'much' is no number"),
        (["--resume", "perhaps"], "--resume: 'perhaps' is neither true nor false"),
        (["--normalize", "max"], "--normalize: 'max' is none of mean, sum"),
        (["--tag", "--depth"], "--tag has no value; one that begins with dashes is written behind it with ="),
    ],
)
def test_values_that_no_option_takes(rerank_arguments, tmp_path, capsys, given, says):
    fails(rerank_arguments(tmp_path / "out.trec") + given, capsys, tmp_path, says)


def test_unknown_key_in_a_config_file(rerank_arguments, tmp_path, capsys):
    (tmp_path / "options.yaml").write_text("dpeth: 3\n")
    arguments = [*rerank_arguments(tmp_path / "out.trec"), "--config", str(tmp_path / "options.yaml")]
    fails(arguments, capsys, tmp_path, "dpeth", "did you mean 'depth'")


@pytest.mark.parametrize(
    ("name", "line", "words"),
    [
        ("corpus.jsonl", '{"_id": "x", "text": ', ["corpus.jsonl:13"]),
        ("corpus.jsonl", '{"_id": "sky-0", "text": "again"}', ["corpus.jsonl:13", "'sky-0' occurs twice"]),
        ("queries.jsonl", '{"text": 3}', ["queries.jsonl:7"]),
    ],
)
def test_bad_collections(toy, tmp_path, capsys, name, line, words):
    folder = tmp_path / "collection"
    shutil.copytree(toy, folder)
    with (folder / name).open("a") as file:
        file.write(line + "\n")
    arguments = ["retrieve", "--collection", str(folder), "--output", str(tmp_path / "out.trec")]
    fails(arguments, capsys, tmp_path, *words)


def test_an_empty_query(toy, tmp_path, capsys, saved_model):
    folder = tmp_path / "collection"
    shutil.copytree(toy, folder)
    queries = [json.loads(line) for line in (folder / "queries.jsonl").read_text().splitlines()]
    queries[2]["text"] = " ? "
    (folder / "queries.jsonl").write_text("".join(json.dumps(query) + "\n" for query in queries))
    (tmp_path / "run.trec").write_text("q3 Q0 sky-0 1 2.0 t\nq3 Q0 sky-1 2 1.0 t\n")
    output = str(tmp_path / "out.trec")
    arguments = ["rerank", "--collection", str(folder), "--run", str(tmp_path / "run.trec"), "--output", output]
    fails([*arguments, "--model", str(saved_model)], capsys, tmp_path, "query 'q3' is empty")


def test_models_that_are_not_there(toy, toy_run, tmp_path, capsys, start_process):
    arguments = ["rerank", "--collection", str(toy), "--run", str(toy_run), "--output", str(tmp_path / "out.trec")]
    (tmp_path / "model").mkdir()
    fails([*arguments, "--model", str(tmp_path / "model")], capsys, tmp_path, "no config.json")
    process = start_process([*arguments, "--model", "some/model"], stderr=-1, text=True)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "is not a local folder" in errors
    assert "Traceback" not in errors


def test_unknown_measures_and_missing_files(toy, toy_run, tmp_path, capsys):
    fails(
        ["evaluate", "--collection", str(toy), "--run", str(toy_run), "--measures", "nDGC@10"],
        capsys, tmp_path, "nDGC", "did you mean 'nDCG'",
    )  # fmt: skip
    fails(["evaluate", "--collection", str(toy), "--run", str(tmp_path / "none")], capsys, tmp_path, "none")
    fails(["evaluate", "--collection", str(tmp_path / "nothing"), "--run", str(toy_run)], capsys, tmp_path, "nothing")


def test_an_output_that_is_what_is_read(toy, toy_run, rerank_arguments, tmp_path, capsys):
    own = tmp_path / "own.trec"
    shutil.copy(toy_run, own)
    (tmp_path / "link.trec").symlink_to(own)
    before = own.read_bytes()
    arguments = rerank_arguments(tmp_path / "link.trec")
    arguments[arguments.index("--run") + 1] = str(own)
    for command in (
        arguments,
        ["fuse", "--run", str(toy_run), "--run", str(own), "--output", str(own)],
        ["interpolate", "--first", str(own), "--run", str(toy_run), "--weight", "0.5", "--output", str(own)],
    ):
        assert main(command) == 2
        assert "is what is read, and would be lost" in capsys.readouterr().err
        assert own.read_bytes() == before


@pytest.mark.parametrize(
    ("verb", "option"),
    [("compare", "--html"), ("evaluate", "--per-query"), ("calibrate", "--plot")],
)
def test_what_a_report_is_made_of_stays(verb, option, toy, toy_run, tmp_path, capsys):
    own = tmp_path / "own.trec"
    shutil.copy(toy_run, own)
    before = own.read_bytes()
    runs = ["--run", str(own)] + (["--baseline", str(toy_run)] if verb == "compare" else [])
    runs += ["--output", str(tmp_path / "c.json")] if verb == "calibrate" else []
    for output, words in ((own, "is what is read, and would be lost"), (tmp_path, "is a folder")):
        command = [verb, "--collection", str(toy), *runs, option, str(output)]
        fails(command, capsys, tmp_path, f"{option} {output}: {words}")
    assert own.read_bytes() == before


def test_ids_that_no_run_can_hold_show_before_the_search_ends(tmp_path, capsys):
    folder = tmp_path / "c"
    folder.mkdir()
    (folder / "corpus.jsonl").write_text('{"_id": "doc 1", "text": "the sky is blue"}\n')
    (folder / "queries.jsonl").write_text('{"_id": "q1", "text": "sky"}\n{"_id": "q2", "text": "blue"}\n')
    assert main(["retrieve", "--collection", str(folder), "--output", str(tmp_path / "r.trec")]) == 2
    error = capsys.readouterr().err
    assert "the id 'doc 1' cannot stand in a run or in qrels: it is empty or holds white space" in error
    assert "r.trec" not in error


def test_an_output_that_is_no_file_is_refused_before_the_work(toy, rerank_arguments, tmp_path, capsys):
    fails(rerank_arguments(tmp_path), capsys, tmp_path, f"--output {tmp_path}: is a folder")
    fails(rerank_arguments("-"), capsys, tmp_path, "--output '-': name a file, or /dev/stdout")
    fails(["retrieve", "--collection", str(toy), "--output", str(tmp_path)], capsys, tmp_path, "is a folder")


def test_a_model_without_its_tokenizer(saved_model, rerank_arguments, tmp_path, capsys):
    for name in ("bert", "llama"):
        build_family(name).save_pretrained(tmp_path / name)
        fails(rerank_arguments("out.trec", "--model", str(tmp_path / name)), capsys, tmp_path, name, "tokenizer")
    shutil.copytree(saved_model, tmp_path / "damaged")
    (tmp_path / "damaged" / "tokenizer.json").write_text('{"version": "1.0"}')
    fails(rerank_arguments("out.trec", "--model", str(tmp_path / "damaged")), capsys, tmp_path, "tokenizer")


def test_passages_to_score_without_a_query(capsys, tmp_path):
    fails(["score", "--passage", "the sky"], capsys, tmp_path, "--passage and --title need a --query")


def test_a_run_without_queries(rerank_arguments, tmp_path, capsys):
    (tmp_path / "empty.trec").write_text("")
    fails(rerank_arguments(tmp_path / "out.trec", run=tmp_path / "empty.trec"), capsys, tmp_path, "ranks no query")
