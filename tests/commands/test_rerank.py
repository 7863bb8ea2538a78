import gzip
import json
import os
import resource
import signal
import subprocess
import threading
import time

import pytest
import torch

from qpeft.cli import main
from qpeft.commands._partial import Partial
from qpeft.data.trec import read_run
from qpeft.types import Hit, QueryBatches, Ranking, ScoringCounts

CASCADE = ("--method", "cascade", "--cascade", "7:2")
ALONE = ("--queries-per-batch", "1")


def test_only_the_runs_passages_are_ranked_and_those_below_the_depth_keep_their_order(
    rerank_arguments, toy_run, tmp_path, capsys
):
    output = tmp_path / "ql.trec"
    assert main(rerank_arguments(output, "--depth", "3", "--tag", "mine")) == 0
    first, reranked = read_run(toy_run), read_run(output)
    assert reranked.tag == "mine"
    assert list(reranked) == list(first)
    for query, ranking in first.items():
        before = [hit.passage_id for hit in ranking.hits]
        after = [hit.passage_id for hit in reranked[query].hits]
        assert sorted(after[:3]) == sorted(before[:3])
        assert after[3:] == before[3:]
    assert any(reranked[q].hits[0].passage_id != first[q].hits[0].passage_id for q in first)
    assert "passages/s" in capsys.readouterr().err


def test_provenance_says_what_made_the_run(rerank_arguments, tmp_path):
    output = tmp_path / "ql.trec"
    assert main(rerank_arguments(output, "--template", "upr")) == 0
    facts = json.loads((tmp_path / "ql.trec.provenance.json").read_text())
    assert facts["template"]["name"] == "upr"
    assert facts["counts"]["pairs"] == sum(len(ranking.hits) for ranking in read_run(output).values())
    assert facts["model"]["dtype"] == "float32"
    assert all(len(facts[part]["sha256"]) == 64 for part in ("model", "first_stage"))
    assert len(facts["collection"]["fingerprint"]) == 64
    assert {"python", "torch", "transformers"} <= set(facts["versions"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ql.trec", "ql.trec.provenance.json"]


def test_gzip_samples_and_interpolation(rerank_arguments, tmp_path, toy_run):
    packed = tmp_path / "ql.trec.gz"
    assert main(rerank_arguments(packed, "--limit-queries", "3", "--seed", "4")) == 0
    assert gzip.decompress(packed.read_bytes()).startswith(b"q")
    again = tmp_path / "again.trec"
    assert main(rerank_arguments(again, "--limit_queries", "3", "--seed=4")) == 0
    assert list(read_run(packed)) == list(read_run(again))
    assert len(read_run(again)) == 3
    first_only = tmp_path / "first.trec"
    assert main(rerank_arguments(first_only, "--interpolate", "1.0")) == 0
    for query, ranking in read_run(first_only).items():
        scores = {hit.passage_id: hit.score for hit in read_run(toy_run)[query].hits}
        ordered = [scores[hit.passage_id] for hit in ranking.hits]
        assert ordered == sorted(ordered, reverse=True)


@pytest.mark.parametrize(
    "more",
    [
        (),
        ("--queries-per-batch", "2"),
        (*ALONE, "--passage-cache", "0.01"),
        (*CASCADE, "--cheap", "layers=1", "--passage-cache", "0.01", "--queries-per-batch", "2"),
    ],
    ids=["plain", "windows", "cache", "cascade"],
)
def test_a_killed_run_resumes_to_the_same_bytes(rerank_arguments, start_process, tmp_path, more):
    whole = tmp_path / "whole.trec"
    assert main(rerank_arguments(whole, *more)) == 0
    output, partial = tmp_path / "killed.trec", tmp_path / "killed.trec.partial"
    for finished in (1, 3):
        process = start_process(rerank_arguments(output, *more, "--resume"))
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if partial.exists() and partial.read_text().count("\n") > finished:
                process.send_signal(signal.SIGKILL)
                break
        process.wait()
    if partial.exists():  # also beside a whole output, if the end came between the two
        with partial.open("a") as file:
            file.write('{"query": "q6", "hi')
        assert main(rerank_arguments(output, *more, "--resume")) == 0
    assert output.read_bytes() == whole.read_bytes()
    assert not partial.exists()


def test_what_is_left_of_an_unfinished_window_is_dropped(tmp_path):
    partial = Partial(tmp_path / "ql.trec", resume=False)
    partial.open("same", {"dtype": "float32"}, batches=QueryBatches(2))
    for pairs, query in enumerate(["q1", "q2", "q3"], start=1):
        partial.add(Ranking(query, (Hit("p", -1.5),)), ScoringCounts(pairs=pairs))
    partial.close()
    resumed = Partial(tmp_path / "ql.trec", resume=True)
    resumed.open("same", resumed.settings, batches=QueryBatches(2))
    resumed.close()
    assert resumed.rankings == [Ranking("q1", (Hit("p", -1.5),)), Ranking("q2", (Hit("p", -1.5),))]
    assert resumed.counts(ScoringCounts(pairs=1)).pairs == 3
    assert resumed.settings == {"dtype": "float32"}
    assert "q3" not in (tmp_path / "ql.trec.partial").read_text()


def unfinished(rerank_arguments, output, *more):
    """Leave an unfinished run of two queries, as a killed process does."""
    whole = output.with_name("whole.trec")
    kept = Partial.remove
    Partial.remove = lambda self: None
    try:
        assert main(rerank_arguments(whole, *more)) == 0
    finally:
        Partial.remove = kept
    lines = whole.with_name("whole.trec.partial").read_text().splitlines(keepends=True)
    partial = output.with_name(output.name + ".partial")
    partial.write_text("".join(lines[:3]))
    return partial, whole


def test_unfinished_runs_are_neither_lost_nor_mixed(rerank_arguments, tmp_path, capsys):
    output = tmp_path / "ql.trec"
    partial, whole = unfinished(rerank_arguments, output, *ALONE)
    before = partial.read_text()
    assert main(rerank_arguments(output, *ALONE)) == 2
    assert "--resume" in capsys.readouterr().err
    assert main(rerank_arguments(output, *ALONE, "--resume", "--template", "upr")) == 2
    assert 'other options, data or model (--template was not given and is "upr"); delete it' in capsys.readouterr().err
    assert partial.read_text() == before
    assert not output.exists()
    assert main(rerank_arguments(output, *ALONE, "--resume", "--run", "/dev/null")) == 2
    assert "/dev/null is a pipe" in capsys.readouterr().err
    assert main(rerank_arguments(output, *ALONE, "--resume", "--run", str(tmp_path / "gone.trec"))) == 2
    assert "gone.trec" in capsys.readouterr().err
    assert main(rerank_arguments(output, *ALONE, "--resume")) == 0
    assert output.read_bytes() == whole.read_bytes()
    counts = [json.loads((tmp_path / f"{n}.provenance.json").read_text())["counts"] for n in ("ql.trec", "whole.trec")]
    assert counts[0] == counts[1]


def test_what_is_finished_is_not_done_again(rerank_arguments, tmp_path, capsys):
    output = tmp_path / "ql.trec"
    assert main(rerank_arguments(output, "--resume")) == 0
    made = output.stat().st_mtime_ns
    capsys.readouterr()
    assert main(rerank_arguments(output, "--resume")) == 0
    said = capsys.readouterr().err
    assert f"{output}: finished before" in said
    assert "passages/s" not in said
    assert output.stat().st_mtime_ns == made
    for changed in (["--resume", "--tag", "mine"], ["--resume", "--template", "upr"], []):
        assert main(rerank_arguments(output, *changed)) == 0
        assert output.stat().st_mtime_ns > made
        made = output.stat().st_mtime_ns
    with output.open("a") as file:
        file.write("# mine\n")
    assert main(rerank_arguments(output, "--resume")) == 2
    assert "is not of" in capsys.readouterr().err
    output.unlink()  # what stands beside it does not stand for it
    assert main(rerank_arguments(output, "--resume")) == 0
    assert read_run(output)


def test_a_run_goes_on_with_the_threads_that_it_began_with(rerank_arguments, tmp_path):
    output, cache = tmp_path / "ql.trec", (*ALONE, "--passage-cache", "0.01")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        partial, whole = unfinished(rerank_arguments, output, *cache)
        assert json.loads(partial.read_text().splitlines()[0])["settings"]["threads"] == 1
        torch.set_num_threads(2)
        assert main(rerank_arguments(output, *cache, "--resume")) == 0
        assert torch.get_num_threads() == 1
        assert output.read_bytes() == whole.read_bytes()
    finally:
        torch.set_num_threads(before)


def test_a_full_disk_ends_in_one_line_and_the_run_can_go_on(rerank_arguments, tmp_path, start_process):
    output = tmp_path / "ql.trec"
    partial, whole = unfinished(rerank_arguments, output, *ALONE)
    # Room for one more query: what the system answers is what it would on a full disk, with another number.
    room = int(1.2 * partial.stat().st_size)
    process = start_process(
        rerank_arguments(output, *ALONE, "--resume"),
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, room)),
    )
    said = process.communicate()[1]
    assert process.returncode == 2, said
    assert "Traceback" not in said
    assert said.splitlines()[-1] == f"qpeft: error: {partial} cannot be written: File too large"
    assert main(rerank_arguments(output, *ALONE, "--resume")) == 0
    assert output.read_bytes() == whole.read_bytes()


def test_cuts_are_shown(rerank_arguments, tmp_path, capsys):
    assert main(rerank_arguments(tmp_path / "ql.trec", "--max-passage-tokens", "1")) == 0
    assert "passages were cut" in capsys.readouterr().err


@pytest.mark.usefixtures("no_rounding")
def test_what_it_cost_is_printed_and_kept(rerank_arguments, tmp_path, capsys):
    costs = {}
    for name, more in (("plain", ()), ("cached", ("--passage-cache", "0.01")), ("one", ("--batch-tokens", "1"))):
        assert main(rerank_arguments(tmp_path / name, *more)) == 0
        costs[name] = json.loads((tmp_path / f"{name}.provenance.json").read_text())["cost"]
    printed = capsys.readouterr().err
    assert printed.count("queries/PetaFLOP") == 3
    assert printed.count("of passages cached") == 1
    assert "memory up to" in printed
    plain, cached, one = costs.values()
    assert plain["queries_per_petaflop"] == pytest.approx(plain["queries"] / plain["flops"] * 1e15, rel=1e-3)
    assert plain["queries"] == len(read_run(tmp_path / "plain"))
    assert (one["padding"], one["tokens"], one["flops"]) == (0, plain["tokens"], plain["flops"])
    assert plain["padding"] > 0
    assert cached["flops"] < plain["flops"]
    assert cached["cached"] + cached["encoded"] == plain["pairs"]
    assert (plain["cached"], plain["peak_device_memory"]) == (None, None)


def test_a_passage_cache_that_is_not_used_is_told(rerank_arguments, tmp_path, capsys):
    cache = ("--passage-cache", "0.01")
    assert main(rerank_arguments(tmp_path / "used", *cache)) == 0
    assert "of no use" not in capsys.readouterr().err
    assert main(rerank_arguments(tmp_path / "unused", *cache, "--document-prior", "0.1")) == 0
    assert "the passage cache was of no use" in capsys.readouterr().err


@pytest.mark.parametrize("cheap", ["first_stage", "passage_tokens=2", "layers=1"])
def test_a_cascade_keeps_below_what_it_drops(rerank_arguments, toy_run, tmp_path, cheap):
    outputs = tmp_path / "ql.trec", tmp_path / "cascade.trec"
    assert main(rerank_arguments(outputs[0], "--depth", "7")) == 0
    assert main(rerank_arguments(outputs[1], "--depth", "7", *CASCADE, "--cheap", cheap)) == 0
    full, ranked = (read_run(output) for output in outputs)
    for query, first in read_run(toy_run).items():
        own = [hit.passage_id for hit in ranked[query].hits]
        assert sorted(own) == sorted(hit.passage_id for hit in first.hits)
        assert own[7:] == [hit.passage_id for hit in first.hits[7:]]
        order = [hit.passage_id for hit in full[query].hits]
        assert order.index(own[0]) < order.index(own[1])
    facts = [json.loads((output.with_name(output.name + ".provenance.json")).read_text()) for output in outputs]
    assert facts[1]["options"]["cheap"] == cheap
    assert facts[1]["counts"]["pairs"] == facts[0]["counts"]["pairs"]
    if cheap == "first_stage":  # the toy passages and the toy model are too short for the others to be cheap
        assert facts[1]["cost"]["flops"] < facts[0]["cost"]["flops"]


def test_a_resumed_cascade_counts_as_an_uninterrupted_one(rerank_arguments, tmp_path):
    more = (*CASCADE, "--cheap", "layers=1", *ALONE)
    output = tmp_path / "ql.trec"
    _, whole = unfinished(rerank_arguments, output, *more)
    assert main(rerank_arguments(output, *more, "--resume")) == 0
    assert output.read_bytes() == whole.read_bytes()
    facts = [json.loads((tmp_path / f"{n}.provenance.json").read_text()) for n in ("ql.trec", "whole.trec")]
    assert facts[0]["counts"] == facts[1]["counts"]
    assert facts[0]["cost"]["queries"] == facts[1]["cost"]["queries"] - 2
    assert facts[0]["cost"]["flops"] < facts[1]["cost"]["flops"]


def test_paths_that_differ_are_named_as_they_were_typed(rerank_arguments, toy_run, tmp_path, capsys):
    unfinished(rerank_arguments, tmp_path / "ql.trec", *ALONE)
    other = tmp_path / "läufe.trec"
    other.write_bytes(toy_run.read_bytes())
    assert main(rerank_arguments(tmp_path / "ql.trec", *ALONE, "--resume", run=other)) == 2
    assert f'(--run was "{toy_run}" and is "{other}")' in capsys.readouterr().err


def test_what_is_done_after_scoring_may_change_when_a_run_goes_on(rerank_arguments, tmp_path):
    unfinished(rerank_arguments, tmp_path / "ql.trec", *ALONE)
    assert (
        main(rerank_arguments(tmp_path / "ql.trec", *ALONE, "--resume", "--tag", "mine", "--interpolate", "0.3")) == 0
    )
    assert main(rerank_arguments(tmp_path / "other.trec", *ALONE, "--tag", "mine", "--interpolate", "0.3")) == 0
    assert (tmp_path / "ql.trec").read_bytes() == (tmp_path / "other.trec").read_bytes()


def test_a_run_from_a_pipe_has_no_hash(rerank_arguments, toy_run, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_bytes(toy_run.read_bytes()))
    writer.start()
    assert main(rerank_arguments(tmp_path / "ql.trec", run=pipe)) == 0
    writer.join()
    assert json.loads((tmp_path / "ql.trec.provenance.json").read_text())["first_stage"]["sha256"] is None
