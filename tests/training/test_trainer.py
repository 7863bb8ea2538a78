"""Training: the same gradients on every path, the same adapter after every interruption."""

import dataclasses
import json

import pytest
import torch
from transformers import TrainerCallback

from qpeft import losses
from qpeft.errors import OptionError, QueryError
from qpeft.template import Prompt, load_template
from qpeft.training import config as training_config
from qpeft.training.config import TrainingConfig
from qpeft.training.dev import DevRanking
from qpeft.training.groups import in_batch_negatives
from qpeft.training.trainer import Collator, Learner, TrainingSet, fit
from qpeft.types import Candidates, Group, Passage, Query
from tiny_adapters import NAMES, build, with_store

TEXTS = {
    "sky": "the blue sky is in the light of the air",
    "sea": "the salty sea and its tide",
    "octopus": "the octopus has three heart",
    "king": "the old king of the city",
    "lion": "the lion and the red cat",
    "river": "a long river from the lake",
}
PASSAGES = {name: Passage(name, text) for name, text in TEXTS.items()}
ASKED = {"sky": "why is the sky blue", "sea": "salty tide", "octopus": "three heart", "king": "who was the old king"}
GROUPS = [
    Group(Query(name, text), (PASSAGES[name],), tuple(p for other, p in PASSAGES.items() if other != name))
    for name, text in ASKED.items()
]
FAST = {"epochs": 3, "batch_queries": 2, "negatives": 2, "evaluations": 6, "warmup": 0.0}


def prompt_for(lm, adapter, template="plain"):
    return Prompt(load_template(template), lm.tokenizer, lm.max_length, hint_length=adapter.hint_length)


def dev_for(lm, adapter, measure="RR@10", **options):
    items = [Candidates(group.query, (*group.positives, *group.negatives)) for group in GROUPS]
    qrels = {group.query.id: {group.query.id: 1} for group in GROUPS}
    return DevRanking(lm, prompt_for(lm, adapter), items, qrels, measure, **options)


def train(lm, adapter, folder, *, dev=False, teacher=None, callbacks=(), resume=False, baselines=False, **options):
    config = TrainingConfig(**(FAST | options))
    return fit(
        lm,
        adapter,
        GROUPS,
        Collator(prompt_for(lm, adapter), config, 0, teacher),
        config,
        checkpoints=folder,
        seed=0,
        dev=dev_for(lm, adapter) if dev is True else dev or None,
        resume=resume,
        baselines=baselines,
        progress=False,
        callbacks=callbacks,
    )


@pytest.fixture
def lm(make_lm):
    return with_store(make_lm("llama"))


def state(adapter):
    return {name: tensor.clone() for name, tensor in adapter.state_dict().items()}


def assert_equal(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def batch_for(lm, adapter, **options):
    config = TrainingConfig(**(FAST | options))
    return Collator(prompt_for(lm, adapter), config, 0)([(0, group) for group in GROUPS])["batch"], config


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "mistral"])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_over_stored_contexts_equal_plain_ones(name, family, make_lm):
    plain = make_lm(family)
    adapter = build(name, plain, trained=True)
    found = []
    for lm in (plain, with_store(plain)):
        batch, config = batch_for(lm, adapter, anchor=0.1)
        for _ in range(2):  # the second time, contexts come from the store
            adapter.zero_grad()
            out = Learner(adapter, lm, config)(batch)
            out["loss"].backward()
        gradients = torch.cat([p.grad.flatten() for p in adapter.parameters() if p.grad is not None])
        found.append((out["loss"].detach(), out["scores"], gradients))
    assert found[0][2].abs().max() > 1e-4
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_is_that_of_each_pairs_mean_likelihood(name, lm):
    adapter = build(name, lm, trained=True)
    batch, config = batch_for(lm, adapter, negatives=3)
    batch.mask[0, -1] = False  # as if the first query had a negative less
    rows = [row for place, row in enumerate(batch.rows) if place != 3]
    out = Learner(adapter, lm, config)(dataclasses.replace(batch, rows=rows))
    values = iter(lm.log_probs(rows, adapters=adapter))
    expected = torch.zeros(batch.mask.shape)
    for place in batch.mask.nonzero().tolist():
        expected[tuple(place)] = next(values).target.mean()
    torch.testing.assert_close(out["scores"], expected, atol=1e-4, rtol=0)
    loss = losses.both(expected, batch.mask, margin=config.margin)
    torch.testing.assert_close(out["loss"], loss, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_training_lowers_the_loss(name, lm, tmp_path):
    adapter = build(name, lm)
    fitted = train(lm, adapter, tmp_path, epochs=10, learning_rate=1e-2, evaluations=1)
    trained = [entry["loss"] for entry in fitted.history if "loss" in entry]
    assert sum(trained[-2:]) < 0.9 * sum(trained[:2])
    assert fitted.steps == len(trained) == 20
    assert not adapter.training


@pytest.mark.parametrize("name", sorted(losses.LOSSES))
def test_every_loss_trains_a_step(name, lm, tmp_path):
    adapter = build("soft_prompt", lm)
    before = state(adapter)
    teacher = {(group.query.id, passage): float(passage == group.query.id) for group in GROUPS for passage in PASSAGES}
    fitted = train(lm, adapter, tmp_path, loss=name, epochs=1, margin=5.0, teacher=teacher)
    assert fitted.steps == 2
    assert all(entry["loss"] > 0 for entry in fitted.history)
    assert not torch.equal(before["vectors"], adapter.vectors)


@pytest.mark.parametrize("name", ["margin_mse", "plackett_luce"])
def test_losses_that_need_a_teacher(name, lm, tmp_path):
    with pytest.raises(OptionError, match=f"{name}' learns from a teacher"):
        train(lm, build("soft_prompt", lm), tmp_path / "c", loss=name)
    assert not (tmp_path / "c").exists()


def test_a_teachers_scores_stand_at_their_passages(lm):
    adapter = build("soft_prompt", lm)
    teacher = {("sky", "sky"): 3.0, ("sky", "sea"): 2.0, ("sea", "sea"): -7.0}
    config = TrainingConfig(**(FAST | {"negatives": 5, "loss": "margin_mse"}))
    groups = [GROUPS[0], dataclasses.replace(GROUPS[1], negatives=())]
    batch = Collator(prompt_for(lm, adapter), config, 0, teacher)([(0, group) for group in groups])["batch"]
    assert sorted(batch.teacher[0].tolist(), reverse=True) == [3.0, 2.0, -7.0, -7.0, -7.0, -7.0]
    assert batch.teacher[0, 0] == 3.0
    assert batch.teacher[1, 0] == -7.0
    assert batch.mask.sum(1).tolist() == [6, 1]


def test_the_anchor_keeps_scores_near_zero_shot(lm, tmp_path):
    distances = []
    for anchor in (0.0, 10.0):
        adapter = build("qpeft_a", lm)
        train(lm, adapter, tmp_path / str(anchor), epochs=8, learning_rate=1e-2, anchor=anchor, evaluations=1)
        batch, config = batch_for(lm, adapter)
        with torch.no_grad():
            scores = Learner(adapter, lm, config)(batch)["scores"]
            zero_shot = Learner(adapter, lm, config)._scores(batch, None)
        distances.append(losses.anchor(scores, zero_shot, batch.mask).item())
    assert distances[1] < 0.5 * distances[0]


# Interruptions


class Killed(Exception):
    """What stands for a power cut."""


class KillAt(TrainerCallback):
    """Ends training after a step, once its checkpoint is written."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Killed


VARIANTS = {
    "plain": ("qpeft_a", {}, {}),
    "dropout": ("qpeft_a", {"attn_dropout": 0.3}, {}),
    "accumulation": ("qpeft_a", {"attn_dropout": 0.3}, {"batch_queries": 1, "gradient_accumulation": 2}),
    "anchor": ("qpeft_c", {}, {"anchor": 0.5, "in_batch": True, "weight_decay": 0.1}),
    "odd": ("soft_prompt", {}, {"batch_queries": 3, "epochs": 5, "evaluations": 7}),
}


@pytest.mark.parametrize("dev", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_killed_training_resumes_to_the_same_bits(variant, dev, make_lm, tmp_path):
    name, options, training = VARIANTS[variant]
    outcomes = []
    for kill in (None, 1, 3):
        lm = with_store(make_lm("llama"))
        adapter = build(name, lm, **options)
        folder = tmp_path / str(kill)
        if kill is not None:
            with pytest.raises(Killed):
                train(lm, adapter, folder, dev=dev, callbacks=[KillAt(kill)], **training)
            assert (folder / f"checkpoint-{kill}").is_dir()
            lm = with_store(make_lm("llama"))
            adapter = build(name, lm, **options)
            torch.manual_seed(99)
        fitted = train(lm, adapter, folder, dev=dev, resume=True, **training)
        outcomes.append((state(adapter), fitted))
    whole = outcomes[0]
    assert whole[1].steps >= 6
    for found, fitted in outcomes[1:]:
        assert_equal(found, whole[0])
        assert fitted.history == whole[1].history
        assert (fitted.steps, fitted.dev) == (whole[1].steps, whole[1].dev)


def test_a_training_killed_after_its_last_step_only_needs_its_end(lm, tmp_path):
    adapter, again = build("soft_prompt", lm), build("soft_prompt", lm)
    fitted = train(lm, adapter, tmp_path, dev=True)
    finished = train(lm, again, tmp_path, dev=True, resume=True)
    assert_equal(state(again), state(adapter))
    assert (finished.history, finished.steps, finished.dev) == (fitted.history, fitted.steps, fitted.dev)


@pytest.mark.parametrize("left", ["adapter.safetensors", "trainer_state.json"])
def test_a_checkpoint_that_is_not_whole_is_passed_over(left, lm, tmp_path):
    whole = build("soft_prompt", lm)
    train(lm, whole, tmp_path / "whole")
    adapter = build("soft_prompt", lm)
    with pytest.raises(Killed):
        train(lm, adapter, tmp_path / "killed", callbacks=[KillAt(3)])
    newest = tmp_path / "killed" / "checkpoint-3"
    for path in newest.iterdir():
        if path.name != left:
            path.unlink()
        elif left == "trainer_state.json":
            path.write_text(path.read_text()[:50])
    again = build("soft_prompt", lm)
    train(lm, again, tmp_path / "killed", resume=True)
    assert_equal(state(again), state(whole))


def test_means_of_the_log_do_not_depend_on_interruptions(lm, tmp_path):
    # 120 steps: losses are logged in twos, or not at all before a checkpoint in between.
    outcomes = []
    options = {"epochs": 60, "evaluations": 8}
    for kill in (None, 45):
        adapter = build("soft_prompt", lm)
        if kill:
            with pytest.raises(Killed):
                train(lm, adapter, tmp_path / str(kill), callbacks=[KillAt(kill)], **options)
            adapter = build("soft_prompt", lm)
        outcomes.append(train(lm, adapter, tmp_path / str(kill), resume=True, **options).history)
    assert outcomes[0] == outcomes[1]


class Scripted(DevRanking):
    """A dev ranking whose values are known beforehand; it keeps what it was shown."""

    def __init__(self, values):
        self.name = "RR@10"
        self.values, self.seen = iter(values), []

    def measure(self, adapter):
        self.seen.append(state(adapter))
        return {self.name: next(self.values)}


def test_the_best_by_dev_is_what_remains(lm, tmp_path):
    adapter = build("soft_prompt", lm)
    dev = Scripted([0.1, 0.2, 0.7, 0.3, 0.7, 0.1])
    fitted = train(lm, adapter, tmp_path, dev=dev)
    assert len(dev.seen) == 6
    assert_equal(state(adapter), dev.seen[2])
    assert fitted.dev["trained"] == 0.7
    assert [entry["eval_RR@10"] for entry in fitted.history if "eval_RR@10" in entry] == [0.1, 0.2, 0.7, 0.3, 0.7, 0.1]
    assert len({tuple(seen["vectors"].flatten().tolist()) for seen in dev.seen}) == 6


def test_without_dev_the_last_state_remains(lm, tmp_path):
    adapter, other = build("soft_prompt", lm), build("soft_prompt", lm)
    train(lm, adapter, tmp_path / "a")
    dev = Scripted([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    train(lm, other, tmp_path / "b", dev=dev)
    assert_equal(state(adapter), dev.seen[-1])
    assert_equal(state(other), dev.seen[-1])


def test_patience_survives_an_interruption(lm, tmp_path):
    values = [0.5, 0.4, 0.3, 0.2, 0.1, 0.0]
    adapter, dev = build("soft_prompt", lm), Scripted(values)
    fitted = train(lm, adapter, tmp_path / "whole", dev=dev, patience=3)
    assert fitted.steps == 4
    assert_equal(state(adapter), dev.seen[0])
    with pytest.raises(Killed):
        train(lm, build("soft_prompt", lm), tmp_path / "k", dev=Scripted(values), patience=3, callbacks=[KillAt(3)])
    again = build("soft_prompt", lm)
    resumed = train(lm, again, tmp_path / "k", dev=Scripted(values[3:]), patience=3, resume=True)
    assert (resumed.steps, resumed.history) == (4, fitted.history)
    assert_equal(state(again), state(adapter))


def test_no_epochs_leave_the_adapter_untrained(lm, tmp_path):
    adapter = build("qpeft_a", lm)
    before = state(adapter)
    fitted = train(lm, adapter, tmp_path / "c", dev=True, epochs=0, baselines=True)
    assert_equal(state(adapter), before)
    assert (fitted.steps, fitted.history) == (0, [])
    assert not (tmp_path / "c").exists()
    assert fitted.dev["untrained"] is not None


def test_baselines_are_those_of_the_model_and_the_untrained_adapter(lm, tmp_path):
    adapter = build("qpeft_r", lm)
    dev = dev_for(lm, adapter)
    expected = dev.measure(None)["RR@10"], dev.measure(adapter)["RR@10"]
    fitted = train(lm, adapter, tmp_path, dev=dev, baselines=True, learning_rate=1e-2)
    assert (fitted.dev["zero_shot"], fitted.dev["untrained"]) == expected
    assert fitted.dev["trained"] == dev.measure(adapter)["RR@10"]


def test_accumulated_batches_equal_a_larger_one(lm, tmp_path):
    found = []
    for batch, accumulated in ((4, 1), (2, 2)):
        adapter = build("soft_prompt", lm)
        options = {"batch_queries": batch, "gradient_accumulation": accumulated, "negatives": 5}
        assert train(lm, adapter, tmp_path / str(batch), learning_rate=1e-2, **options).steps == 3
        found.append(adapter.vectors.detach().clone())
    torch.testing.assert_close(*found, atol=1e-4, rtol=0)


def test_token_tables_are_not_decayed(lm, tmp_path):
    adapter = build("qpeft_r", lm, token_table="trainable")
    before = state(adapter)
    train(lm, adapter, tmp_path, weight_decay=0.5, learning_rate=1e-2)
    moved = (before["token_table"] != adapter.token_table).any(1)
    assert 0 < moved.sum() < len(moved) // 2, "only the tokens of hints have moved"


def test_the_preset_authors_trains(lm, tmp_path):
    adapter = build("qpeft_a", lm, authors=True)
    config = dataclasses.replace(training_config.Authors(), epochs=1)
    collator = Collator(prompt_for(lm, adapter, "qpeft"), config, 0)
    fitted = fit(lm, adapter, GROUPS, collator, config, checkpoints=tmp_path, seed=0, progress=False)
    assert fitted.steps == 1
    assert fitted.history[0]["learning_rate"] == 3e-2


# Data


def test_every_epoch_has_every_query_once_in_another_order():
    data = TrainingSet(GROUPS, 5, seed=3)
    orders = []
    for epoch in range(5):
        items = [data[epoch * 4 + place] for place in range(4)]
        assert {e for e, _ in items} == {epoch}
        orders.append([group.query.id for _, group in items])
        assert sorted(orders[-1]) == sorted(ASKED)
    assert len(set(map(tuple, orders))) > 2
    again = TrainingSet(GROUPS, 5, seed=3)
    assert [again[13][1], again[2][1]] == [data[13][1], data[2][1]]


def test_other_queries_positives_are_negatives_too(lm):
    adapter = build("soft_prompt", lm)
    batch, _ = batch_for(lm, adapter, negatives=0, in_batch=True)
    assert batch.mask.tolist() == [[True] * 4] * 4
    starts = [row.context[: row.passage[1]] for row in batch.rows]
    for own in range(4):
        assert len(set(starts[4 * own : 4 * own + 4])) == 4
        assert starts[4 * own] == starts[[0, 5, 10, 15][own]]
        assert [row.query for row in batch.rows[4 * own : 4 * own + 4]] == [batch.rows[4 * own].query] * 4


def ids(passages):
    return [passage.id for passage in passages]


def test_in_batch_negatives():
    own = Passage("own", "the blue sky"), Passage("second", "the  red\nsky")
    drawn = (own[0], Passage("drawn", "the sea"))
    group = Group(Query("q", "why", ("three", "Old King")), own, drawn[1:])
    others = [
        own[0],
        Passage("own", "another text under the same id"),
        Passage("copy", "the blue  sky"),
        own[1],
        Passage("second copy", "the red sky"),
        drawn[1],
        Passage("drawn copy", "the sea", "title"),
        Passage("good", "the moon"),
        Passage("good", "the moon"),
        Passage("good copy", "the\nmoon"),
        Passage("answer", "an octopus has three heart"),
        Passage("answer too", "the old king."),
        Passage("no answer", "the oldest king", "three"),
        Passage("title", "", "Sea"),
        Passage("other title", "", "Lake"),
        Passage("title copy", " ", "Sea"),
        Passage("empty", " "),
    ]
    assert ids(in_batch_negatives(group, drawn, others)) == ["good", "no answer", "title", "other title"]
    titled = Group(Query("q", "why"), (Passage("p", "", "Sea"),))
    assert ids(in_batch_negatives(titled, titled.positives, others[-4:])) == ["other title"]


def test_a_positive_of_two_other_queries_is_a_negative_once(lm):
    adapter = build("soft_prompt", lm)
    shared = [Group(Query(str(i), "the tide"), (PASSAGES["sea"],)) for i in range(2)]
    config = TrainingConfig(negatives=0, in_batch=True)
    batch = Collator(prompt_for(lm, adapter), config, 0)([(0, group) for group in (*shared, GROUPS[0])])["batch"]
    assert batch.mask.sum(1).tolist() == [2, 2, 2]


def test_hints_of_other_queries(lm):
    adapter = build("qpeft_a", lm)
    read = {"sky": GROUPS[3].query}
    config = TrainingConfig(negatives=1)
    batch = Collator(prompt_for(lm, adapter), config, 0, None, read)([(0, GROUPS[0]), (0, GROUPS[1])])["batch"]
    plain, _ = batch_for(lm, adapter, negatives=1)
    assert batch.rows[0].query == plain.rows[6].query
    assert batch.rows[0].target == plain.rows[0].target
    assert batch.rows[2].query == plain.rows[2].query
    changed, same = dev_for(lm, adapter, hint_queries=read).rank(adapter), dev_for(lm, adapter).rank(adapter)
    assert changed["sky"] != same["sky"]
    assert changed["sea"] == same["sea"]


def test_dev_ranks_what_cannot_be_read_last(lm):
    adapter = build("qpeft_a", lm)
    passages = (Passage("a", " "), Passage("b", "the sky"), Passage("c", ""), Passage("d", "sea"))
    dev = DevRanking(lm, prompt_for(lm, adapter), [Candidates(GROUPS[0].query, passages)], {"sky": {"a": 1}}, "RR@10")
    for who in (None, adapter):
        hits = dev.rank(who)["sky"].hits
        assert [hit.passage_id for hit in hits][2:] == ["c", "a"]
    assert dev.measure(adapter) == {"RR@10": 0.25}


def test_the_measure_goes_by_its_canonical_name(lm, tmp_path):
    adapter = build("soft_prompt", lm)
    dev = dev_for(lm, adapter, "nDCG(cutoff=3)")
    fitted = train(lm, adapter, tmp_path, dev=dev, epochs=1, measure="nDCG(cutoff=3)")
    assert any("eval_nDCG@3" in entry for entry in fitted.history)
    with pytest.raises(OptionError, match="one measure decides, not 2"):
        dev_for(lm, adapter, "RR@10 nDCG@10")
    with pytest.raises(OptionError, match="did you mean 'nDCG'"):
        dev_for(lm, adapter, "nDGC@10")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_queries": 0}, "--batch-queries is 0; it must be at least 1"),
        ({"gradient_accumulation": 0}, "--gradient-accumulation is 0"),
        ({"evaluations": 0}, "--evaluations is 0"),
        ({"epochs": -1}, "--epochs is -1; it must be at least 0"),
        ({"negatives": -1}, "--negatives is -1"),
        ({"anchor": float("nan")}, "--anchor is nan"),
        ({"learning_rate": 0.0}, "--learning-rate is 0.0; it must be above 0"),
        ({"warmup": 1.5}, "--warmup is 1.5"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(OptionError, match=message):
        TrainingConfig(**options)


def test_nothing_to_train(lm, tmp_path):
    adapter = build("qpeft_r", lm, mlp_layers=0)
    with pytest.raises(OptionError, match="nothing of this adapter is trainable"):
        train(lm, adapter, tmp_path)
    with pytest.raises(OptionError, match="no query has a positive passage"):
        config, adapter = TrainingConfig(), build("soft_prompt", lm)
        fit(lm, adapter, [], Collator(prompt_for(lm, adapter), config, 0), config, checkpoints=tmp_path, seed=0)


def test_a_query_without_room_is_named(make_lm, tmp_path):
    lm = make_lm("llama", max_length=24)
    with pytest.raises(QueryError, match="query '.*' needs .* no room for a passage"):
        train(lm, build("soft_prompt", lm, length=20), tmp_path)


def test_checkpoints_hold_the_adapter_alone(lm, tmp_path):
    adapter = build("qpeft_a", lm)
    train(lm, adapter, tmp_path)
    newest = tmp_path / "checkpoint-6"
    assert (newest / "adapter.safetensors").stat().st_size < 8 * adapter.count_parameters()
    assert json.loads((newest / "trainer_state.json").read_text())["global_step"] == 6
    assert len(list(tmp_path.glob("checkpoint-*"))) == 2
