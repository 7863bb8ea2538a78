import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
import yaml

from qpeft import adapters, methods
from qpeft.cli import COMMANDS, main
from qpeft.data.collection import open_collection
from qpeft.data.trec import read_run
from qpeft.evaluation.interpolation import choose_weight, interpolate
from qpeft.evaluation.measures import evaluate
from qpeft.lm.causal import CausalLM


def test_an_index_is_kept_and_found_again(toy, toy_run, tmp_path):
    index, output = tmp_path / "index", tmp_path / "a.trec"
    arguments = ["retrieve", "--collection", str(toy), "--output", str(output), "--depth", "8", "--index", str(index)]
    assert main([*arguments, "--stopwords="]) == 0
    made = (index / "passage_ids.json").stat().st_mtime_ns
    assert output.read_bytes() == toy_run.read_bytes()
    assert main([*arguments, "--stopwords="]) == 0
    assert (index / "passage_ids.json").stat().st_mtime_ns == made
    assert output.read_bytes() == toy_run.read_bytes()
    assert main([*arguments, "--stopwords=", "--k1", "0.9"]) == 0
    assert (index / "passage_ids.json").stat().st_mtime_ns != made


def test_an_index_is_made_again_for_a_corpus_that_was_written_since(toy, tmp_path):
    collection, index = tmp_path / "collection", tmp_path / "index"
    shutil.copytree(toy, collection)
    arguments = ["retrieve", "--collection", str(collection), "--output", str(tmp_path / "a.trec")]
    assert main([*arguments, "--index", str(index)]) == 0
    made = (index / "passage_ids.json").stat().st_mtime_ns
    written = (collection / "corpus.jsonl").stat().st_mtime_ns
    os.utime(collection / "corpus.jsonl", ns=(written + 1, written + 1))
    assert main([*arguments, "--index", str(index)]) == 0
    assert (index / "passage_ids.json").stat().st_mtime_ns != made


def test_a_collection_without_judgements_is_ranked_whole(toy, toy_run, rerank_arguments, tmp_path, capsys):
    collection = tmp_path / "collection"
    shutil.copytree(toy, collection)
    shutil.rmtree(collection / "qrels")
    output = ["--collection", str(collection), "--output", str(tmp_path / "a.trec")]
    assert main(["retrieve", *output, "--depth", "8", "--stopwords="]) == 0
    assert dict(read_run(tmp_path / "a.trec")) == dict(read_run(toy_run))
    assert main([*rerank_arguments(tmp_path / "b.trec"), "--collection", str(collection)]) == 0
    assert len(read_run(tmp_path / "b.trec")) == 6
    assert main(["evaluate", "--collection", str(collection), "--run", str(tmp_path / "b.trec")]) == 2
    assert "has no split 'test'" in capsys.readouterr().err


def test_fuse_and_interpolate(toy, toy_run, rerank_arguments, tmp_path, capsys):
    reranked, fused, mixed = (tmp_path / name for name in ("ql.trec", "fused.trec", "mixed.trec"))
    assert main(rerank_arguments(reranked)) == 0
    assert main(["fuse", "--run", str(toy_run), "--run", str(reranked), "--output", str(fused), "--depth", "2"]) == 0
    assert all(len(ranking.hits) == 2 for ranking in read_run(fused).values())
    dev = ["--collection", str(toy), "--dev-first", str(toy_run), "--dev-run", str(reranked)]
    arguments = ["interpolate", "--first", str(toy_run), "--run", str(reranked), "--output", str(mixed), "--tag", "m"]
    assert main([*arguments, *dev]) == 0
    first, second = read_run(toy_run), read_run(reranked)
    choice = choose_weight(first, second, open_collection(str(toy)).qrels("dev"), "RR@10")
    facts = json.loads((tmp_path / "mixed.trec.provenance.json").read_text())
    assert facts["weight"] == choice.weight
    assert dict(read_run(mixed)) == dict(interpolate(first, second, choice.weight))
    capsys.readouterr()
    assert main(arguments) == 2
    assert "--dev-run" in capsys.readouterr().err
    assert main(rerank_arguments(reranked, "--depth", "3")) == 0
    assert main([*arguments, "--weight", "0.3"]) == 0
    found, shallow, deep = (
        {(query, hit.passage_id): hit.score for query, ranking in run.items() for hit in ranking.hits}
        for run in (read_run(mixed), *(interpolate(first, read_run(reranked), 0.3, depth=depth) for depth in (3, None)))
    )
    assert found == pytest.approx(shallow, rel=1e-5)
    assert found != pytest.approx(deep, rel=1e-5)
    on_dev = tmp_path / "on-dev.trec"
    assert main(rerank_arguments(on_dev, "--depth", "2")) == 0
    assert main([*arguments, *dev[:4], "--dev-run", str(on_dev)]) == 0
    facts = json.loads((tmp_path / "mixed.trec.provenance.json").read_text())
    choice = choose_weight(first, read_run(on_dev), open_collection(str(toy)).qrels("dev"), "RR@10", depth=2)
    assert facts["choice"]["curve"] == [list(point) for point in choice.curve]
    assert facts["options"]["depth"] == 3
    assert main([*arguments, "--weight", "0.3", "--depth", "0"]) == 2
    assert "depth is 0" in capsys.readouterr().err


def test_the_weight_is_chosen_on_dev_alone(toy, tmp_path):
    folder = tmp_path / "collection"
    shutil.copytree(toy, folder)
    for split, query in (("dev", "q1"), ("test", "q2")):
        (folder / "qrels" / f"{split}.tsv").write_text(f"query-id\tcorpus-id\tscore\n{query}\tking-1\t1\n")
    # The first stage is right on dev, the reranker on test.
    best = {"dev-first": "king-1", "dev-run": "sky-0", "first": "sky-0", "run": "king-1"}
    arguments = ["interpolate", "--collection", str(folder), "--output", str(tmp_path / "mixed.trec")]
    for option, passage in best.items():
        query, path = "q1" if option.startswith("dev") else "q2", tmp_path / f"{option}.trec"
        other = "sky-0" if passage == "king-1" else "king-1"
        path.write_text(f"{query} Q0 {passage} 1 2.0 {option}\n{query} Q0 {other} 2 1.0 {option}\n")
        arguments += [f"--{option}", str(path)]
    assert main(arguments) == 0
    facts = json.loads((tmp_path / "mixed.trec.provenance.json").read_text())
    assert facts["weight"] > 0.5
    assert [hit.passage_id for hit in read_run(tmp_path / "mixed.trec")["q2"].hits] == ["sky-0", "king-1"]


def typed(content):
    """Return bytes as standard input."""
    return io.TextIOWrapper(io.BytesIO(content), encoding="utf-8")


def test_score_from_options_and_from_standard_input(saved_model, capsys, monkeypatch):
    model = ["--model", str(saved_model), "--dtype", "float32"]
    assert main(["score", *model, "--query", "why", "--passage", "the sky", "--passage", "the sea"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["index"] for line in lines] == [0, 1]
    assert {line["rank"] for line in lines} == {1, 2}
    best = min(lines, key=lambda line: line["rank"])
    assert best["score"] == max(line["score"] for line in lines)
    texts = '{"query": "why", "passages": ["the sky", "the sea"]}\n\n{"query": "why", "passage": "the sky"}\n'
    monkeypatch.setattr(sys, "stdin", typed(texts.encode()))
    assert main(["score", *model]) == 0
    again = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert again[:2] == lines
    assert again[2]["score"] == pytest.approx(lines[0]["score"], abs=1e-5)
    assert main(["score", *model, "--query", "why", "--passage", "same", "--passage", "same"]) == 0
    ranks = [json.loads(line)["rank"] for line in capsys.readouterr().out.splitlines()]
    assert ranks == [1, 2], "equal scores keep the order given"
    for line in (b'{"query": "why"}\n', '{"query": "why", "passage": "caf\xe9"}'.encode("latin-1")):
        monkeypatch.setattr(sys, "stdin", typed(line))
        assert main(["score", *model]) == 2
        assert "standard input:1" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdin", typed(b'{"query": "why", "passage": "\\ud83d sky"}'))
    assert main(["score", *model]) == 0
    assert json.loads(capsys.readouterr().out)["passage"] == "\ufffd sky"
    monkeypatch.setattr(sys, "stdin", typed(b""))
    assert main(["score"]) == 0


def test_a_query_of_standard_input_that_cannot_be_scored_is_named_by_its_line(saved_model, capsys, monkeypatch):
    for query, words in (("  ", "is empty"), ("sky " * 400, "leave")):
        lines = [json.dumps({"query": each, "passage": "the sky"}) for each in ("why", query)]
        monkeypatch.setattr(sys, "stdin", typed("\n\n".join(lines).encode()))
        assert main(["score", "--model", str(saved_model)]) == 2
        message = capsys.readouterr().err.splitlines()[-1]
        assert "'line 3'" in message
        assert words in message


def test_titles_are_scored_wherever_they_come_from(saved_model, capsys, monkeypatch):
    model = ["score", "--model", str(saved_model), "--dtype", "float32"]
    given = ["--query", "why", "--passage", "the sky", "--title", "Old kings", "--passage", "the sea", "--title", ""]
    assert main([*model, *given]) == 0
    expected = [json.loads(line)["score"] for line in capsys.readouterr().out.splitlines()]
    for lines in (
        b'{"query": "why", "passages": [{"text": "the sky", "title": "Old kings"}, "the sea"]}',
        b'{"query": "why", "passage": "the sky", "title": "Old kings"}\n{"query": "why", "passage": "the sea"}',
    ):
        monkeypatch.setattr(sys, "stdin", typed(lines))
        assert main(model) == 0
        scores = [json.loads(line)["score"] for line in capsys.readouterr().out.splitlines()]
        assert scores == pytest.approx(expected, abs=1e-5)
    for line, words in (
        (b'{"query": "why", "passages": ["the sky"], "title": "Old kings"}', "'title' is for one 'passage'"),
        (b'{"query": "why", "passages": ["the sky"], "passage": "the sea"}', "has 'passage' and 'passages'"),
        (b'{"query": "why", "passages": ["the sky", {"title": "Old kings"}]}', "passages[1]: no 'text'"),
        (b'{"query": "why", "passage": "the sky", "title": ["Old kings"]}', "'title' is ['Old kings'], not a string"),
    ):
        monkeypatch.setattr(sys, "stdin", typed(line))
        assert main(model) == 2
        assert words in capsys.readouterr().err


def test_what_is_typed_counts_before_a_file_wherever_it_stands(saved_model, tmp_path, capsys):
    (tmp_path / "options.yaml").write_text("method: yes_no\nwindows: 48\npassage: [the sea]\n")
    file = ["--config", str(tmp_path / "options.yaml")]
    typed = ["--model", str(saved_model), "--method", "query_likelihood", "--document-prior", "0.1", "--query", "why"]
    scores = []
    for arguments in ([*file, *typed], [*typed, *file], [*typed[:2], f"--config={file[1]}", *typed[2:]]):
        assert main(["score", *arguments]) == 0
        scores.append(capsys.readouterr().out)
    assert len(set(scores)) == 1


@pytest.mark.parametrize("form", ["text", "json", "markdown", "latex", "csv"])
@pytest.mark.parametrize("labels", ["qrels", "answers"])
def test_evaluate(toy, toy_run, tmp_path, capsys, form, labels):
    values = tmp_path / "values.jsonl"
    arguments = ["evaluate", "--collection", str(toy), "--run", str(toy_run), "--measures", "RR@10 CandHit@5"]
    assert main([*arguments, "--format", form, "--labels", labels, "--per-query", str(values)]) == 0
    out = capsys.readouterr().out
    lines = [json.loads(line) for line in values.read_text().splitlines()]
    mean = sum(line["value"] for line in lines if line["measure"] == "RR@10") / 6
    assert str(round(mean, 4))[:5] in out
    if labels == "qrels":
        expected = evaluate(read_run(toy_run), open_collection(str(toy)).qrels("test"), "RR@10").means["RR@10"]
        assert mean == pytest.approx(expected)


def test_compare_writes_a_report(toy, toy_run, rerank_arguments, tmp_path, capsys):
    reranked, report = tmp_path / "ql.trec", tmp_path / "report.html"
    assert main(rerank_arguments(reranked)) == 0
    arguments = ["compare", "--collection", str(toy), "--baseline", str(toy_run), "--run", str(reranked)]
    assert main([*arguments, "--html", str(report)]) == 0
    page = report.read_text()
    assert "query_likelihood" in page
    assert "<script" not in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert main([*arguments, "--all-pairs", "--format", "json"]) == 0
    assert "Holm" in capsys.readouterr().out


def test_a_report_on_a_run_that_can_be_read_once(toy, toy_run, rerank_arguments, tmp_path, capsys):
    reranked, pipe, report = tmp_path / "ql.trec", tmp_path / "pipe", tmp_path / "report.html"
    assert main(rerank_arguments(reranked)) == 0
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_bytes(reranked.read_bytes()))
    writer.start()
    runs = ["--baseline", str(toy_run), "--run", str(pipe)]
    assert main(["compare", "--collection", str(toy), *runs, "--html", str(report)]) == 0
    writer.join()
    assert hashlib.sha256().hexdigest() not in report.read_text(), "the fingerprint of nothing"
    assert hashlib.sha256(toy_run.read_bytes()).hexdigest() in report.read_text()


def test_data_info_and_convert(tmp_path, capsys):
    squad = {
        "data": [
            {
                "title": "Sky",
                "paragraphs": [
                    {
                        "context": "The sky is blue.",
                        "qas": [{"id": "q", "question": "colour", "answers": [{"text": "blue", "answer_start": 11}]}],
                    }
                ],
            }
        ]
    }
    (tmp_path / "squad.json").write_text(json.dumps(squad))
    folder = tmp_path / "beir"
    source = ["--source", str(tmp_path / "squad.json"), "--output", str(folder)]
    assert main(["data", "convert", *source, "--format", "squad", "--split", "dev"]) == 0
    capsys.readouterr()
    assert main(["data", "info", "--collection", str(folder)]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["passages"], facts["splits"]["dev"]["queries"]) == (1, 1)


def test_a_config_file_equals_flags(toy, toy_run, tmp_path):
    output = tmp_path / "b.trec"
    options = {"collection": str(toy), "output": str(output), "depth": 8, "stopwords": "", "first_stage": "bm25"}
    (tmp_path / "options.yaml").write_text(yaml.safe_dump(options))
    assert main(["retrieve", "--config", str(tmp_path / "options.yaml")]) == 0
    assert output.read_bytes() == toy_run.read_bytes()


def test_help_imports_no_torch():
    code = (
        "import sys, contextlib, io\n"
        "from qpeft.cli import COMMANDS, main\n"
        "for name in ['', *COMMANDS]:\n"
        "    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as out:\n"
        "        main([*name.split(), '--help'])\n"
        "    assert 'usage: qpeft' in out.getvalue(), name\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_every_command_has_help_of_its_own(capsys):
    for name in COMMANDS:
        with pytest.raises(SystemExit):
            main([*name.split(), "--help"])
        assert f"usage: qpeft {name}" in capsys.readouterr().out


def test_doctor_checks_the_scorer(capsys):
    assert main(["doctor", "--seconds", "0.1"]) == 0
    out = capsys.readouterr().out
    assert "self-check             passed" in out
    assert "passage cache          can be used\nlast layer             computed where it is read\nFLOPs" in out
    assert "passages/s" in out


@pytest.mark.parametrize("wrong", [0.01, float("nan")])
def test_doctor_finds_wrong_scores(wrong, monkeypatch, capsys):
    right = CausalLM.log_probs

    def log_probs(self, rows, **options):
        *others, last = right(self, rows, **options)
        return [*others, replace(last, target=last.target + wrong)]

    monkeypatch.setattr(CausalLM, "log_probs", log_probs)
    assert main(["doctor", "--seconds", "0.1"]) == 2
    assert "self-check failed: batched and plain scores of tiny-lm differ by" in capsys.readouterr().err


def test_doctor_does_not_check_in_float32_what_does_not_know_it(capsys):
    main(["doctor", "--seconds", "0.1", "--attention-kernel", "flash_attention_2"])
    assert "left out: it is in float32, which flash_attention_2 does not know" in capsys.readouterr().out


def test_demo_goes_the_whole_way(tmp_path, capsys):
    assert main(["demo", "--output", str(tmp_path / "demo"), "--limit-queries", "2", "--depth", "3"]) == 0
    assert "query_likelihood+bm25" in capsys.readouterr().out
    assert (tmp_path / "demo" / "report.html").stat().st_size > 10_000


@pytest.mark.parametrize("arguments", [["rerank"], ["score"], ["train", "--adapter", "lora"]])
def test_help_names_what_there_is(arguments, capsys):
    with pytest.raises(SystemExit):
        main([*arguments, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    there = adapters if arguments[0] == "train" else methods
    assert ": " + ", ".join(there.available()) in text
    assert "[" + there.__name__.removeprefix("qpeft.") + "]" not in text


@pytest.mark.parametrize("options", [["--adapter", "qpeft_c"], ["--adapter", "qpeft_r", "--preset", "authors"]])
def test_inherited_options_have_help_too(options, capsys):
    with pytest.raises(SystemExit):
        main(["train", *options, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--margin MARGIN Of the hinge, in nats per query token." in text
    assert "Words before the hint." in text
    assert "--patience PATIENCE Stop after so many evaluations" in text


def test_passages_encoded_ahead_are_found_by_reranking(toy, rerank_arguments, tmp_path, capsys):
    plain, cached, folder = tmp_path / "plain.trec", tmp_path / "cached.trec", tmp_path / "cache"
    assert main(rerank_arguments(plain)) == 0
    arguments, cache = rerank_arguments(cached), ["--passage-cache-folder", str(folder)]
    model = [*arguments[arguments.index("--model") :], *cache]
    index = ["index-cache", "--collection", str(toy), *model]
    count = len(open_collection(str(toy)).passages)
    for new in (count, 0):
        assert main(index) == 0
        assert f"{count} passages, {new} encoded now" in capsys.readouterr().out
    files = sorted(folder.rglob("*.safetensors"))
    assert len(files) == count
    files[0].unlink()
    assert main(index) == 0
    assert f"{count} passages, 1 encoded now" in capsys.readouterr().out
    assert main([*arguments, *cache]) == 0
    for query, ranking in read_run(cached).items():
        expected = {hit.passage_id: hit.score for hit in read_run(plain)[query].hits}
        assert {hit.passage_id: hit.score for hit in ranking.hits} == pytest.approx(expected, abs=1e-4)
    assert sorted(folder.rglob("*.safetensors")) == files, "nothing had to be encoded"
    assert main(index[:-2]) == 2
    assert "--passage-cache-folder is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("rankllama", "it has no target"),
        ("yes_no", "it has no target"),
        ("qpeft_prefix", "a hint before the passage leaves nothing to keep"),
    ],
)
def test_nothing_is_encoded_ahead_that_nobody_could_read(toy, saved_model, tmp_path, capsys, template, why):
    index = ["index-cache", "--collection", str(toy), "--model", str(saved_model)]
    assert main([*index, "--template", template, "--passage-cache-folder", str(tmp_path / "cache")]) == 2
    assert f"--template {template}: {why}" in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()


def test_costs_of_runs_that_know_them(toy, toy_run, rerank_arguments, tmp_path, capsys):
    output = tmp_path / "ql.trec"
    assert main(rerank_arguments(output, "--tag", "ql")) == 0
    capsys.readouterr()
    runs = ["--collection", str(toy), "--run", str(output)]
    assert (
        main(["evaluate", *runs, "--run", str(toy_run), "--cost", "--format", "json", "--measures", "RR@10 R@5"]) == 0
    )
    ranked, first = json.loads(capsys.readouterr().out)["runs"]
    kept = json.loads((tmp_path / "ql.trec.provenance.json").read_text())["cost"]
    assert ranked["cost"]["flops"] == kept["flops"]
    expected = ranked["means"]["RR@10"] * kept["queries"] / kept["flops"] * 1e15
    assert ranked["cost"]["quality_per_petaflop"] == pytest.approx(expected)
    assert first["cost"] is None
    page = tmp_path / "page.html"
    assert main(["compare", *runs, "--baseline", str(toy_run), "--cost", "--html", str(page)]) == 0
    assert "QPP" in capsys.readouterr().out
    assert "RPP nDCG@10" in page.read_text()
    assert main(["compare", *runs, "--baseline", str(toy_run)]) == 0
    assert "QPP" not in capsys.readouterr().out
    for beside, words in (
        ('{"cost": {"seconds": 1}}', "not provenance of a run"),
        ('{"options": {}, "cost": {"seconds": 1}}', "not the cost of a run"),
        ('{"options": {}, "cost": null}', "not the cost of a run"),
        ("{", "not JSON"),
    ):
        (tmp_path / "ql.trec.provenance.json").write_text(beside)
        assert main(["evaluate", *runs]) == 0
        assert main(["evaluate", *runs, "--cost"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "ql.trec.provenance.json" in line
        assert words in line


def test_a_log_holds_no_progress_bars(saved_model):
    command = [
        sys.executable,
        "-m",
        "qpeft",
        "score",
        "--model",
        str(saved_model),
        "--query",
        "sky",
        "--passage",
        "blue",
    ]
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_DISABLE_PROGRESS_BARS"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert "weights" not in done.stderr
    assert json.loads(done.stdout)["rank"] == 1
