"""The benchmarks measure what they say: same work, same scores, right products, right ratios."""

import argparse
import asyncio
import json
import sys
from importlib import resources
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import ablation
import cascade
import gpu
import naive
import pairs
import peers
import rounds
import scaling
import scoring
import storage
import tables
import training
from ceiling import needed
from qpeft.lm import cpu_attention
from qpeft.loading import load_lm
from qpeft.model_config import ModelConfig
from qpeft.template import Row
from qpeft.types import Candidates


@pytest.fixture(scope="module")
def items():
    return pairs.candidates("mini", queries=2, depth=5, pool=6)


@pytest.fixture(scope="module")
def exact():
    return load_lm(ModelConfig("tiny-lm", dtype="float32", device="cpu"))


def random_rows(count, vocabulary=300):
    """Return rows of different lengths."""
    found = []
    for row in gpu.varied_rows(count, count):
        tokens = [token % (vocabulary - 3) + 3 for token in (*row.context, *row.target)]
        context, target = tokens[: len(row.context) // 4], tokens[len(row.context) :]
        found.append(Row(tuple(context), tuple(target), row.scored, (3, len(context)), None, ()))
    return found


class TestPairs:
    def test_every_query_meets_a_relevant_passage_among_its_candidates(self, items):
        qrels = pairs.open_collection("mini").qrels("test")
        for item in items:
            assert len({passage.id for passage in item.passages}) == 5
            assert any(qrels[item.query.id].get(passage.id, 0) > 0 for passage in item.passages)

    def test_facts_count_pairs_and_different_passages(self, items):
        facts = pairs.facts(items)
        assert facts["pairs"] == 10
        assert facts["passages"] == len({passage.id for item in items for passage in item.passages}) <= 6

    def test_generated_passages_are_all_different(self):
        texts = [passage.text for item in scaling.generated(3, 50) for passage in item.passages]
        assert len(set(texts)) == 150


class TestRounds:
    def test_cases_take_turns_forwards_and_backwards(self):
        order = []
        cases = {name: rounds.Case(lambda name=name: order.append(name), 1) for name in "abc"}
        rounds.interleave(cases, 3)
        assert order == list("abccbaabc")

    def test_ratio_is_of_pairs_per_second_and_of_rounds(self):
        quick, slow = rounds.Case(None, pairs=10), rounds.Case(None, pairs=5)
        quick.seconds, slow.seconds = [1.0, 1.0, 2.0], [1.0, 2.0, 2.0]
        quick.cpu_seconds, slow.cpu_seconds = [1.0] * 3, [3.0] * 3
        assert rounds.ratio(quick, slow) == {"median": 2.0, "low": 2.0, "high": 4.0, "cpu": 6.0}

    def test_set_up_is_outside_the_time(self):
        seen = []
        case = rounds.Case(lambda: seen.append(len(case.seconds)), 1, before=lambda: seen.append("before"))
        case.time()
        assert seen == ["before", 0]
        assert len(case.seconds) == len(case.cpu_seconds) == 1

    def test_exponent_of_a_power_law(self):
        points = [{"pairs": n, "seconds": 3 * n**0.5} for n in (10, 100, 1000, 10_000)]
        assert scaling.exponent(points) == pytest.approx(0.5)


KINDS = (ablation.CausalLM, ablation.InOrder, ablation.WholeLastLayer, ablation.OneAtATime)


class TestCeiling:
    @pytest.mark.parametrize("name", ["bert", "llama", "qwen3"])
    @pytest.mark.usefixtures("no_rounding")
    def test_products_are_those_of_a_model_that_computes_all(self, make_lm, name):
        plain = make_lm(name)
        lm = ablation.WholeLastLayer(plain.model, plain.tokenizer, name=name, max_length=128, batch_tokens=4096)
        lm.model.set_attn_implementation("eager")
        (row,) = random_rows(1)
        products, attention = needed(lm, [row])
        with FlopCounterMode(display=False) as counter:
            lm.log_probs([row])
        counted = {str(kind): flops for kind, flops in counter.get_flop_counts()["Global"].items()}
        square = counted.pop("aten.bmm")
        assert sum(product.flops for product in products) == sum(counted.values())
        length = len(row) - 1
        assert attention.flops == square * (length + 1) // (2 * length)

    def test_several_rows_need_the_sum_of_what_each_needs(self, make_lm):
        lm = make_lm("llama")
        rows = random_rows(4)

        def flops(some):
            products, attention = needed(lm, some)
            return sum(product.flops for product in products), attention.flops

        each = [flops([row]) for row in rows]
        together = flops(rows)
        assert together[0] == sum(linear for linear, _ in each)
        assert together[1] == pytest.approx(sum(triangle for _, triangle in each), rel=0.02)


class TestSameScores:
    def test_loop_agrees_with_ours(self, exact, items):
        found = scoring.plain(exact).score(pairs.texts(items))
        assert naive.Loop(exact.model, exact.tokenizer, rows=2)(items) == pytest.approx(found, abs=1e-4)

    def test_a_difference_makes_the_comparison_void(self):
        scores = {scoring.LOOP: [-1.0, -2.0], scoring.OURS: [-1.0, -2.01]}
        assert scoring.check(scores, "bfloat16")[scoring.OURS]["largest difference"] == pytest.approx(0.01)
        with pytest.raises(scoring.DisagreementError, match=r"0\.01 nats off"):
            scoring.check(scores, "float32")
        with pytest.raises(scoring.DisagreementError, match="fp32"):
            scoring.check({scoring.LOOP: [-1.0], "qpeft, fp32": [-1.01]}, "bfloat16")
        with pytest.raises(scoring.DisagreementError):
            scoring.check({**scores, scoring.OURS: [-1.0, float("nan")]}, "bfloat16")

    def test_changes_of_the_ablation_leave_scores_alone(self, make_lm):
        lm = make_lm("gemma2", padding_side="right")
        rows = random_rows(7)
        expected = gpu.means(lm, rows)
        bench = argparse.Namespace(lm=lm)
        changed = {kind: ablation.Bench.again(bench, kind) for kind in KINDS}
        for other in changed.values():
            assert gpu.means(other, rows) == pytest.approx(expected, abs=1e-4)
        whole = changed[ablation.CausalLM]
        whole.model = ablation.FullLogits(whole.model)
        assert gpu.means(whole, rows) == pytest.approx(expected, abs=1e-4)

    @pytest.mark.usefixtures("no_rounding", "one_thread")
    def test_batches_in_the_order_given_fit_and_are_not_sorted(self, make_lm):
        lm = make_lm("llama", batch_tokens=200)
        other = ablation.InOrder(lm.model, lm.tokenizer, name="in order", max_length=128, batch_tokens=200)
        rows = random_rows(9)
        seen = []
        with ablation.tokens_sent(lm.model) as sent:
            hook = lm.model.register_forward_pre_hook(
                lambda _, __, inputs: seen.append(tuple(inputs["input_ids"].shape)), with_kwargs=True
            )
            other.log_probs(rows)
            hook.remove()
        assert sum(height for height, _ in seen) == 9
        assert seen[0][1] == max(len(row) for row in rows[: seen[0][0]]) - 1
        assert all(height * (width + 1) <= 200 for height, width in seen)
        assert sum(sent) == sum(height * width for height, width in seen)

    @pytest.mark.parametrize("whole", [False, True])
    def test_attention_over_whole_rows_takes_no_blocks(self, exact, monkeypatch, whole):
        exact.model.set_attn_implementation(cpu_attention.NAME)
        rows = [row for row in gpu.varied_rows(6, 6) if len(row) > 120]
        widths = []
        weights = cpu_attention._weights
        monkeypatch.setattr(
            cpu_attention, "_weights", lambda query, *rest: widths.append(query.shape[2]) or weights(query, *rest)
        )
        for place, value in {"qpeft.lm.cpu_attention.TILES": False, **(ablation.WHOLE_ROWS if whole else {})}.items():
            monkeypatch.setattr(place, value)
        exact.log_probs(rows)
        assert (max(widths) > 96) == whole

    def test_log_softmax_whole(self):
        logits, tokens = torch.randn(5, 11), torch.tensor([0, 3, 10, 4, 4])
        expected = torch.log_softmax(logits, -1)[torch.arange(5), tokens]
        torch.testing.assert_close(ablation.log_softmax_whole(logits, tokens), expected)

    def test_packed_rows_and_equal_lengths(self, make_lm):
        lm = make_lm("llama")
        lm.model.set_attn_implementation("sdpa")
        rows = random_rows(7)
        expected = gpu.means(lm, rows)
        assert gpu.packed(lm, rows, budget=120) == pytest.approx(expected, abs=1e-4)
        assert gpu.equal_lengths(lm, rows) == pytest.approx(expected, abs=1e-4)
        assert gpu.loop(lm, rows, 3) == pytest.approx(expected, abs=1e-4)

    def test_float32_reference_leaves_the_weights_as_they_were(self, make_lm):
        lm, rows = make_lm("llama"), random_rows(5)
        lm.model.bfloat16()
        before = {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}
        rounded = gpu.loop(lm, rows, 2)
        exact = gpu.in_float32(lm, rows)
        after = lm.model.state_dict()
        assert all(after[name].dtype == tensor.dtype and after[name].equal(tensor) for name, tensor in before.items())
        assert exact != rounded
        lm.model.float()
        assert exact == pytest.approx(gpu.loop(lm, rows, 5), abs=1e-4)


class TestWholeScripts:
    """On little work: every way runs, agrees, and stands in the table with what was wanted."""

    @pytest.mark.usefixtures("one_thread")
    def test_gpu(self, tmp_path, capsys):
        output = tmp_path / "gpu.json"
        little = ["--pairs", "4", "--training-rows", "4", "--rounds", "1", "--packed-tokens", "400"]
        gpu.main(["--device", "cpu", "--shape", "tiny", *little, "--output", str(output)])
        result = json.loads(output.read_text())
        found = result["shapes"]["tiny"]
        named = {each["what"] for each in found["found"] if "value" in each}
        assert {gpu.OURS, gpu.COLD, gpu.WARM, gpu.BARE, "packed rows, sdpa", "training, lora, whole rows"} <= named
        assert {each["what"] for each in found["found"] if "absent" in each} == {
            "qpeft, attention flash_attention_2",
            "packed rows, flash_attention_2",
        }
        assert len(found["targets"]) == 6
        assert all(each["met"] == (each["measured"] >= each["wanted"]) for each in found["targets"][:-1])
        assert tables.render(result).strip() in capsys.readouterr().out

    @pytest.mark.usefixtures("one_thread")
    def test_training(self, tmp_path, capsys):
        output = tmp_path / "training.json"
        training.main(["--shape", "tiny", "--rows", "8", "--batch", "4", "--rounds", "2", "--output", str(output)])
        result = json.loads(output.read_text())
        assert list(result["modes"]) == list(training.MODES)
        whole, encoded, kept = (case["saved MiB"] for case in result["modes"].values())
        assert encoded == kept < whole
        assert not result["absent"]
        assert tables.render(result).strip() in capsys.readouterr().out

    @pytest.mark.usefixtures("one_thread")
    def test_storage(self, tmp_path):
        output = tmp_path / "storage.json"
        storage.main(["--split", "test", "--queries", "4", "--depth", "3", "--output", str(output)])
        rows = json.loads(output.read_text())["rows"]
        assert rows["exact"]["largest difference"] == 0
        for kind in ("int8", "fp8"):
            assert 0.5 < rows[kind]["bytes a token"] / rows["exact"]["bytes a token"] < 0.6
            assert 0 < rows[kind]["mean difference"] <= rows[kind]["largest difference"] < 0.5


class TestPeers:
    def test_absent_packages_are_named(self, monkeypatch, tmp_path):
        monkeypatch.setitem(sys.modules, "minicons", None)
        monkeypatch.setitem(sys.modules, "rerankers.models.llm_layerwise_ranker", None)
        opened, absent = peers.open_peers("tiny", "unread", tmp_path)
        assert not opened
        assert absent["minicons conditional_score, fp32"].startswith("not installed")
        assert set(absent) == {*peers.CROSS_ENCODERS, *peers.CAUSAL, *peers.T5}

    def test_one_that_fails_is_named_with_its_reason(self, items):
        def breaks(_):
            raise ValueError("no such thing\nand more")

        working, absent = scoring.warmed({"good": len, "bad": breaks}, {"gone": "why"}, items)
        assert list(working) == ["good"]
        assert absent == {"gone": "why", "bad": "does not run: ValueError: no such thing"}

    def test_cross_encoder_of_the_same_shape_scores_every_pair(self, tmp_path, items):
        pytest.importorskip("sentence_transformers")
        folder = peers.cross_encoder_folder(scoring.model_folder("tiny-lm", tmp_path), tmp_path / "encoder")
        assert len(peers.sentence_transformers(folder, torch.float32)(items)) == 10

    def test_t5_for_peers_reads_words(self, tmp_path, items):
        folder = peers.t5_folder(tmp_path)
        tokenizer = peers.T5Tokenizer.from_pretrained(folder)
        ids = tokenizer("the river and its engines")["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == "the river and its engines"


class TestResults:
    def test_scoring_measures_and_renders(self, tmp_path):
        args = scoring.parse(["--shape", "tiny", "--queries", "1", "--depth", "2", "--rounds", "1"])
        result = scoring.compare(args, tmp_path)
        result = json.loads(json.dumps({**result, "collection": "mini", "made": rounds.made()}))
        text = tables.render(result)
        for name in (*result["cases"], *result["absent"]):
            assert f"| {name} |" in text
        assert "≥ 5" in text

    def test_ablation_measures_and_renders(self, tmp_path):
        args = scoring.parse(["--ablation", "--queries", "2", "--depth", "2", "--rounds", "1"])
        result = ablation.measure(args, tmp_path)
        result = json.loads(json.dumps({**result, "collection": "mini", "made": rounds.made()}))
        assert f"| {ablation.FULL} |" in tables.render(result)
        assert 0 <= result["padded share"][ablation.FULL] < 1

    def test_page_is_filled_from_results_alone(self, tmp_path, monkeypatch):
        monkeypatch.setattr(tables, "RESULTS", tmp_path)
        page = "before\n<!-- result: scaling.json -->\nold\n<!-- end -->\nafter\n"
        assert tables.page(page) == page.replace("old", tables.MISSING)
        points = [{"grows": "queries", "queries": 1, "candidates": 100, "pairs": 100, "seconds": 0.5, "peak MiB": 99.0}]
        result = {"kind": "scaling", "points": points, "exponents": {"queries": 1.01}, "made": rounds.made()}
        (tmp_path / "scaling.json").write_text(json.dumps(result))
        filled = tables.page(page)
        assert "| 1 × 100 | 100 | 0.5 | 5,000 | 99 |" in filled
        assert filled.startswith("before\n<!-- result")
        assert filled.endswith("<!-- end -->\nafter\n")
        assert tables.page(filled) == filled

    @pytest.mark.parametrize(("page", "least"), [(tables.PAGE, 6), (tables.README, 1)])
    def test_pages_say_what_the_results_say(self, page, least):
        text = page.read_text(encoding="utf-8")
        assert tables.page(text) == text, "run benchmarks/tables.py --update"
        assert len(tables.MARKED.findall(text)) >= least

    def test_other_ways_score_the_same_pairs(self):
        result = json.loads((tables.RESULTS / "scoring-tiny-lm-cpu-amx.json").read_text(encoding="utf-8"))
        counts = {name: tables.count(case) for name, case in result["cases"].items()}
        assert {n for name, n in counts.items() if not name.endswith("(T5)")} == {result["pairs"]["pairs"]}
        assert {n for name, n in counts.items() if name.endswith("(T5)")} == {scoring.T5_PAIRS}


def test_small_batches_of_candidates_are_pairs():
    query = pairs.Query("q", "why")
    item = Candidates(query, (pairs.Passage("a", "x"), pairs.Passage("b", "y")))
    assert [passage.id for _, passage in pairs.texts([item])] == ["a", "b"]


class TestServing:
    def test_a_server_whose_model_fails_on_a_word_starts_and_answers_the_rest(self):
        server_process = pytest.importorskip("server_process", exc_type=ImportError)
        args = argparse.Namespace(model="tiny-lm", device="cpu", dtype="float32")
        bodies = server_process.make_requests(2, 2)
        bodies[1]["documents"][0]["text"] += f" {server_process.POISON}"

        async def statuses():
            async with server_process.serving(args, poisoned=True) as server:
                return [(await server.client.post("/v1/rerank", json=body)).status_code for body in bodies]

        assert asyncio.run(statuses()) == [200, 500]


class TestCascade:
    ARGUMENTS = argparse.Namespace(data=Path(str(resources.files("qpeft"))) / "collections", queries=3, depth=12)

    @pytest.fixture(autouse=True)
    def small(self, monkeypatch):
        monkeypatch.setattr(cascade, "COLLECTIONS", ("mini",))
        settings = (("12:3", "passage_tokens=16"), ("12:3", "layers=4"), ("12:8:3", "first_stage,layers=4"))
        monkeypatch.setattr(cascade, "CHECKED", settings)

    def test_what_is_put_together_equals_what_is_run(self, exact, capsys):
        cascade.check(exact, self.ARGUMENTS)
        assert capsys.readouterr().out.count("checked") == 3

    def test_another_order_and_other_flops_are_noticed(self, exact, monkeypatch):
        rank = cascade.rank
        monkeypatch.setattr(
            cascade, "rank", lambda scorers, items, sizes, cheap: rank(scorers, items, [12, 4], cheap[-1:])
        )
        with pytest.raises(SystemExit, match="ranked otherwise"):
            cascade.check(exact, self.ARGUMENTS)
        monkeypatch.setattr(cascade, "decoder_flops", lambda *_: 1)
        with pytest.raises(SystemExit, match="FLOPs counted"):
            cascade.check(exact, self.ARGUMENTS)
