"""Training: the same gradients on every path, the same adapter after every interruption."""

import copy
import dataclasses
import json
import math
import resource
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from qpeft import losses
from qpeft.errors import OptionError, QueryError, ScoreError, StateError
from qpeft.lm import cpu_attention
from qpeft.lm.context_store import ContextStore
from qpeft.training import config as training_config
from qpeft.training import contexts
from qpeft.training.config import TrainingConfig
from qpeft.training.dev import DevRanking
from qpeft.training.keep_steps import KeepSteps
from qpeft.training.trainer import Collator, Learner, TrainingSet, _newest, fit
from tiny_adapters import NAMES, alike, build, with_store
from tiny_training import FAST, GROUPS, PASSAGES, batch_for, dev_for, scorer_for, step


def train(lm, adapter, folder, *, dev=False, teacher=None, callbacks=(), resume=False, baselines=False, **options):
    config, scorer = TrainingConfig(**(FAST | options)), scorer_for(lm, adapter)
    return fit(
        scorer,
        adapter,
        GROUPS,
        Collator(scorer, config, 0, teacher),
        config,
        checkpoints=folder,
        seed=0,
        dev=dev_for(scorer) if dev is True else dev or None,
        resume=resume,
        baselines=baselines,
        progress=False,
        callbacks=callbacks,
    )


TRAINABLE = {"qpeft_a": {"token_table": "trainable"}}
"""So that there is a table, which is not decayed."""


@pytest.fixture
def lm(make_lm):
    return with_store(make_lm("llama"))


def state(adapter):
    return {name: tensor.clone() for name, tensor in adapter.state_dict().items()}


def assert_equal(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "mistral"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kernel", ["eager", cpu_attention.NAME])
def test_gradients_over_encoded_contexts_equal_plain_ones(name, family, kernel, make_lm):
    plain = make_lm(family)
    adapter = build(name, plain, trained=True)
    found = []
    for lm in (plain, with_store(plain), with_store(plain, 0)):
        lm.model.set_attn_implementation(kernel)
        step(lm, adapter, anchor=0.1)
        found.append(step(lm, adapter, anchor=0.1))  # now contexts come from the store
    assert found[0][2].abs().max() > 1e-4
    for whole, kept, encoded in zip(*found, strict=True):
        torch.testing.assert_close(kept, whole, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(encoded, whole, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_do_not_vanish_in_float16(name, make_lm):
    exact = make_lm("llama")
    half = alike(exact, model=copy.deepcopy(exact.model).half())
    adapter = build(name, exact, trained=True)
    gradients = [step(lm, adapter)[2] for lm in (exact, half)]
    assert (gradients[1] - gradients[0]).norm() < 0.02 * gradients[0].norm()
    assert not (gradients[0].abs() > 1e-6)[gradients[1] == 0].any()


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_is_that_of_each_pairs_mean_likelihood(name, lm):
    adapter = build(name, lm, trained=True)
    batch, config = batch_for(lm, adapter, negatives=3)
    batch.mask[0, -1] = False  # as if the first query had a negative less
    rows = [row for place, row in enumerate(batch.rows) if place != 3]
    out = Learner(adapter, config, scorer_for(lm, adapter))(dataclasses.replace(batch, rows=rows))
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
    batch, config = batch_for(lm, adapter)
    losses_seen = []
    for epochs in (0, 8):
        fitted = train(lm, adapter, tmp_path, epochs=epochs, learning_rate=3e-2, evaluations=1)
        assert not adapter.training
        with torch.no_grad():
            losses_seen.append(Learner(adapter, config, scorer_for(lm, adapter))(batch)["loss"].item())
    assert fitted.steps == 16
    assert [entry["epoch"] for entry in fitted.history if "loss" in entry] == [step / 2 for step in range(1, 17)]
    assert losses_seen[1] < losses_seen[0] - 0.03


RATES = {
    "cosine": lambda after: 0.5 * (1 + math.cos(math.pi * after)),
    "linear": lambda after: 1 - after,
    "constant_with_warmup": lambda after: 1.0,
    "constant": None,
}
"""Shares of the learning rate by the share of the steps that are done after the warm-up; constant has no warm-up."""


def plain_training(lm, adapter, config):
    """Train as AdamW is written (arXiv 1711.05101, algorithm 2), step by step."""
    scorer = scorer_for(lm, adapter)
    collator, learner = Collator(scorer, config, 0), Learner(adapter, config, scorer)
    items = TrainingSet(GROUPS, config.epochs, 0)
    batches = [
        collator([items[i] for i in range(start, min(start + config.batch_queries, len(items)))])["batch"]
        for start in range(0, len(items), config.batch_queries)
    ]
    count = config.gradient_accumulation
    steps = [batches[start : start + count] for start in range(0, len(batches), count)]
    warm = int(config.warmup * len(steps))
    named = dict(adapter.named_parameters())
    first = {name: torch.zeros_like(p) for name, p in named.items()}
    second = {name: torch.zeros_like(p) for name, p in named.items()}
    rates = []
    for t, some in enumerate(steps):
        share = 1.0
        if RATES[config.scheduler] is not None:
            share = t / warm if t < warm else RATES[config.scheduler]((t - warm) / (len(steps) - warm))
        rate = config.learning_rate * share
        adapter.zero_grad()
        for batch in some:
            (learner(batch)["loss"] / count).backward()
        norm = math.sqrt(sum(p.grad.pow(2).sum().item() for p in named.values()))
        clip = min(1.0, config.max_grad_norm / norm) if config.max_grad_norm else 1.0
        for name, p in named.items():
            grad = clip * p.grad
            first[name] = 0.9 * first[name] + 0.1 * grad
            second[name] = 0.999 * second[name] + 0.001 * grad**2
            step = (first[name] / (1 - 0.9 ** (t + 1))) / ((second[name] / (1 - 0.999 ** (t + 1))).sqrt() + 1e-8)
            decay = 0.0 if name.endswith(("bias", "token_table")) else config.weight_decay
            with torch.no_grad():
                p -= rate * (step + decay * p)
        rates.append(rate)
    return rates


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("soft_prompt", {"scheduler": "cosine", "warmup": 0.3, "max_grad_norm": 0.01}),
        ("soft_prompt", {"scheduler": "linear", "batch_queries": 1, "gradient_accumulation": 2, "weight_decay": 0.3}),
        ("qpeft_a", {"scheduler": "constant_with_warmup", "warmup": 0.5, "weight_decay": 0.3}),
        ("qpeft_a", {"scheduler": "constant", "warmup": 0.5, "max_grad_norm": 0.0}),
    ],
)
def test_training_is_that_of_a_plain_loop(name, options, lm, tmp_path):
    options = {"epochs": 5, "learning_rate": 1e-2, "evaluations": 1, **options}
    mine, plain = (build(name, lm, trained=True, **TRAINABLE.get(name, {})) for _ in range(2))
    begun = state(mine)
    fitted = train(lm, mine, tmp_path, **options)
    rates = plain_training(lm, plain, TrainingConfig(**(FAST | options)))
    assert [entry["learning_rate"] for entry in fitted.history] == pytest.approx(rates[: len(fitted.history)])
    assert len(fitted.history) == len(rates) == fitted.steps == 10
    for key, expected in state(plain).items():
        torch.testing.assert_close(mine.state_dict()[key], expected, atol=2e-5, rtol=0)
        assert (expected - begun[key]).abs().max() > 1e-3, "what hardly moves tells nothing"


def test_the_seed_is_that_of_dropout_too(lm, tmp_path):
    found = []
    for seed in (0, 0, 1):
        adapter = build("qpeft_a", lm, trained=True, attn_dropout=0.5)
        config, scorer = TrainingConfig(**(FAST | {"epochs": 2, "evaluations": 1})), scorer_for(lm, adapter)
        folder = tmp_path / str(len(found))
        one = GROUPS[:1]  # which have one order
        fit(scorer, adapter, one, Collator(scorer, config, 0), config, checkpoints=folder, seed=seed, progress=False)
        found.append(state(adapter))
    assert_equal(*found[:2])
    assert not torch.equal(found[0]["attention.query"], found[2]["attention.query"])


@pytest.mark.parametrize("name", sorted(losses.LOSSES.keys() - {"sft"}))  # which is for answers, not likelihoods
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


def test_the_anchor_keeps_scores_near_zero_shot(lm, tmp_path):
    distances = []
    for anchor in (0.0, 10.0):
        adapter = build("qpeft_a", lm)
        train(lm, adapter, tmp_path / str(anchor), epochs=8, learning_rate=1e-2, anchor=anchor, evaluations=1)
        batch, config = batch_for(lm, adapter)
        with torch.no_grad():
            learner = Learner(adapter, config, scorer_for(lm, adapter))
            scores, zero_shot = learner(batch)["scores"], learner._learned(batch, None)[0]
        distances.append(losses.anchor(scores, zero_shot, batch.mask).item())
    assert distances[1] < 0.5 * distances[0]


# Interruptions


class KilledError(Exception):
    """What stands for a power cut."""


class KillAt(TrainerCallback):
    """Ends training after a step, once its checkpoint is written."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KilledError


VARIANTS = {
    "plain": ("qpeft_a", {}, {}),
    "dropout": ("qpeft_a", {"attn_dropout": 0.3}, {}),
    "accumulation": ("qpeft_a", {"attn_dropout": 0.3}, {"batch_queries": 1, "gradient_accumulation": 2}),
    "anchor": ("qpeft_c", {}, {"anchor": 0.5, "in_batch": True, "weight_decay": 0.1}),
    "odd": ("soft_prompt", {}, {"batch_queries": 3, "epochs": 5, "evaluations": 7}),
    "tables": ("qpeft_r", {"token_table": "trainable", "mlp_init": "default"}, {"weight_decay": 0.1}),
    "passages": ("passage_prompt", {}, {"scheduler": "linear", "warmup": 0.4}),
    "layers": ("lora", {"r": 2, "dropout": 0.2}, {}),
    "layers and a hint": ("lora", {"r": 2, "hint": "soft_prompt"}, {}),
    "16 bits": ("qpeft_a", {"attn_dropout": 0.3}, {}),
    "experts": ("qpeft_a", {}, {}),
    "disk": ("qpeft_c", {}, {}),
}


def opened(variant, make_lm, folder):
    """Return the model of a variant, as a process opens it."""
    lm = make_lm("mixtral" if variant == "experts" else "llama")
    model = copy.deepcopy(lm.model).bfloat16() if variant == "16 bits" else lm.model
    store = ContextStore(0, folder) if variant == "disk" else ContextStore(1 << 28)
    return alike(lm, model=model, store=store)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_killed_training_resumes_to_the_same_bits(variant, make_lm, tmp_path):
    name, options, training = VARIANTS[variant]
    dev = variant != "dropout"
    outcomes = []
    for kill in (None, 3):
        lm = opened(variant, make_lm, tmp_path / f"contexts {kill}")
        adapter = build(name, lm, **options)
        folder = tmp_path / str(kill)
        if kill is not None:
            with pytest.raises(KilledError):
                train(lm, adapter, folder, dev=dev, callbacks=[KillAt(kill)], **training)
            assert (folder / f"checkpoint-{kill}").is_dir()
            adapter.withdraw()
            lm = opened(variant, make_lm, tmp_path / f"contexts {kill}")
            adapter = build(name, lm, **options)
            torch.manual_seed(99)
        fitted = train(lm, adapter, folder, dev=dev, resume=True, **training)
        outcomes.append((state(adapter), fitted))
        adapter.withdraw()
    (expected, whole), (found, fitted) = outcomes
    assert whole.steps >= 6
    assert_equal(found, expected)
    assert fitted.history == whole.history
    assert (fitted.steps, fitted.dev) == (whole.steps, whole.dev)


def test_contexts_on_disk_train_the_same_adapter(make_lm, tmp_path):
    outcomes = []
    for capacity, folder in ((1 << 28, None), (0, tmp_path / "disk"), (20_000, tmp_path / "both")):
        lm = alike(make_lm("llama"), store=ContextStore(capacity, folder))
        adapter = build("qpeft_c", lm)
        train(lm, adapter, tmp_path / str(capacity), dev=True)
        outcomes.append(state(adapter))
        assert lm.store.hits > lm.store.misses == len(PASSAGES)
        assert folder is None or any(folder.iterdir())
    assert_equal(outcomes[0], outcomes[1])
    assert_equal(outcomes[0], outcomes[2])


def counted_batches(lm):
    """Return a list that grows by the size of each batch of contexts."""
    sizes, encode = [], lm._encode
    lm._encode = lambda some, *layer: sizes.append(len(some)) or encode(some, *layer)
    return sizes


def test_contexts_of_the_next_steps_are_encoded_together(make_lm, tmp_path, monkeypatch):
    """Each once, in fewer batches; what is trained is the same as with contexts that each step encodes."""
    outcomes, batches = [], []
    for rows in (0, 256):
        monkeypatch.setattr(contexts, "AHEAD", rows)
        lm = with_store(make_lm("llama"))
        sizes = counted_batches(lm)
        adapter = build("qpeft_r", lm)
        train(lm, adapter, tmp_path / str(rows), batch_queries=1, negatives=1)
        outcomes.append(state(adapter))
        batches.append(len(sizes))
        assert lm.store.misses == sum(sizes) == len(PASSAGES)
    assert_equal(*outcomes)
    assert batches[0] > batches[1] == 2, "six contexts in batches of four"


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
    with pytest.raises(KilledError):
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
            with pytest.raises(KilledError):
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


def test_the_best_is_found_again_where_the_checkpoints_were_moved(lm, tmp_path, monkeypatch):
    values = [0.1, 0.7, 0.3, 0.2, 0.1, 0.0]
    dev = Scripted(values)
    monkeypatch.chdir(tmp_path)
    train(lm, build("soft_prompt", lm), Path("a"), dev=dev)
    (tmp_path / "a").rename(tmp_path / "b")
    adapter = build("soft_prompt", lm)
    fitted = train(lm, adapter, tmp_path / "b", dev=Scripted([]), resume=True)
    assert fitted.dev["trained"] == 0.7
    assert_equal(state(adapter), dev.seen[1])
    shutil.rmtree(tmp_path / "b" / "checkpoint-2")
    with pytest.raises(StateError, match="checkpoint-2 is missing, the best state"):
        train(lm, adapter, tmp_path / "b", dev=Scripted([]), resume=True)


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
    with pytest.raises(KilledError):
        train(lm, build("soft_prompt", lm), tmp_path / "k", dev=Scripted(values), patience=3, callbacks=[KillAt(3)])
    again = build("soft_prompt", lm)
    resumed = train(lm, again, tmp_path / "k", dev=Scripted(values[3:]), patience=3, resume=True)
    assert (resumed.steps, resumed.history) == (4, fitted.history)
    assert_equal(state(again), state(adapter))


def test_dev_is_ranked_without_dropout(lm, tmp_path, monkeypatch):
    adapter = build("qpeft_a", lm, attn_dropout=0.5)
    dev, modes = dev_for(scorer_for(lm, adapter)), []
    measure = dev.measure

    def watched(who):
        modes.append(who.training)
        return measure(who)

    monkeypatch.setattr(dev, "measure", watched)
    train(lm, adapter, tmp_path, dev=dev)
    assert modes == [False] * 6


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
    dev = dev_for(scorer_for(lm, adapter))
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
    scorer = scorer_for(lm, adapter, "qpeft")
    collator = Collator(scorer, config, 0)
    fitted = fit(scorer, adapter, GROUPS, collator, config, checkpoints=tmp_path, seed=0, progress=False)
    assert fitted.steps == 1
    assert fitted.history[0]["learning_rate"] == 3e-2


def test_the_measure_goes_by_its_canonical_name(lm, tmp_path):
    adapter = build("soft_prompt", lm)
    dev = dev_for(scorer_for(lm, adapter), "nDCG(cutoff=3)")
    fitted = train(lm, adapter, tmp_path, dev=dev, epochs=1, measure="nDCG(cutoff=3)")
    assert any("eval_nDCG@3" in entry for entry in fitted.history)
    with pytest.raises(OptionError, match="one measure decides, not 2"):
        dev_for(scorer_for(lm, adapter), "RR@10 nDCG@10")
    with pytest.raises(OptionError, match="did you mean 'nDCG'"):
        dev_for(scorer_for(lm, adapter), "nDGC@10")


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
    config, adapter = TrainingConfig(), build("soft_prompt", lm)
    scorer = scorer_for(lm, adapter)
    with pytest.raises(OptionError, match="no query has a positive passage"):
        fit(scorer, adapter, [], Collator(scorer, config, 0), config, checkpoints=tmp_path, seed=0)


def test_a_query_without_room_is_named(make_lm, tmp_path):
    lm = make_lm("llama", max_length=24)
    with pytest.raises(QueryError, match=r"query '.*' needs .* no room for a passage"):
        train(lm, build("soft_prompt", lm, length=20), tmp_path)


def test_checkpoints_hold_the_adapter_alone(lm, tmp_path):
    adapter = build("qpeft_a", lm)
    train(lm, adapter, tmp_path)
    newest = tmp_path / "checkpoint-6"
    assert (newest / "adapter.safetensors").stat().st_size < 8 * adapter.count_parameters()
    assert json.loads((newest / "trainer_state.json").read_text())["global_step"] == 6
    assert len(list(tmp_path.glob("checkpoint-*"))) == 2


def test_a_loss_that_is_no_number_ends_the_training(lm, tmp_path):
    adapter = build("soft_prompt", lm)
    with torch.no_grad():
        adapter.vectors.fill_(torch.nan)
    with pytest.raises(ScoreError, match="the loss became nan"):
        train(lm, adapter, tmp_path)


def test_weights_that_the_last_step_made_infinite_end_the_training(lm, tmp_path):
    with pytest.raises(ScoreError, match="the adapter's weights became infinite"):
        train(lm, build("soft_prompt", lm), tmp_path, epochs=1, learning_rate=1e38, max_grad_norm=0.0, batch_queries=64)


@pytest.mark.parametrize("full", ["adapter.safetensors", "optimizer.pt", "rng_state.pth"])
def test_a_full_disk_leaves_the_checkpoint_before_it(full, lm, tmp_path):
    whole, adapter, again = (build("soft_prompt", lm) for _ in range(3))
    fitted = train(lm, whole, tmp_path / "whole", dev=True)
    folder, limits = tmp_path / "full", resource.getrlimit(resource.RLIMIT_FSIZE)

    class FillDisk(TrainerCallback):
        """Lets no file grow as large as this one of the checkpoint before; what is written ahead of it is smaller."""

        def on_evaluate(self, args, state, control, **kwargs):
            if state.global_step == 4:
                size = (folder / "checkpoint-3" / full).stat().st_size
                resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, limits[1]))

    try:
        with pytest.raises(StateError, match=r"full/checkpoint-4 cannot be written: ."):
            train(lm, adapter, folder, dev=True, callbacks=[FillDisk()])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (folder / "checkpoint-4").exists()
    resumed = train(lm, again, folder, dev=True, resume=True)
    assert_equal(state(again), state(whole))
    assert (resumed.history, resumed.dev) == (fitted.history, fitted.dev)


def test_a_folder_that_cannot_be_made_is_named(lm, tmp_path):
    (tmp_path / "checkpoint-1").write_text("in the way")
    with pytest.raises(StateError, match="checkpoint-1 cannot be written: "):
        train(lm, build("soft_prompt", lm), tmp_path)


def test_a_step_that_does_not_fit_in_memory_is_an_error_that_says_what_to_lower(lm, tmp_path, monkeypatch):
    def no_room(self, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(torch.Tensor, "backward", no_room)
    with pytest.raises(OptionError, match="a step does not fit in the memory of cpu: lower --batch-queries and raise"):
        train(lm, build("soft_prompt", lm), tmp_path)


def kept_steps(lm, folder, values, *, every, kill=None, **options):
    """Train, in two parts if it is killed, and return the steps that were kept, with what was kept of them."""
    kept = {}
    for resume in (False, True) if kill else (False,):
        adapter = build("soft_prompt", lm)
        keeping = KeepSteps(every, lambda step, adapter=adapter: kept.update({step: state(adapter)}))
        dev = Scripted(values[kill or 0 :] if resume else values) if values else None
        kills = [KillAt(kill)] if kill and not resume else []
        with pytest.raises(KilledError) if kills else nullcontext():
            train(lm, adapter, folder, dev=dev, resume=resume, callbacks=[keeping, *kills], **options)
    return kept


@pytest.mark.parametrize("kill", [None, 3])
def test_the_last_step_is_kept_too(kill, lm, tmp_path):
    kept = kept_steps(lm, tmp_path / "a", None, every=4, kill=kill)
    assert sorted(kept) == [0, 4, 6]
    values = [0.5, 0.4, 0.3, 0.2, 0.1, 0.0]
    stopped = kept_steps(lm, tmp_path / "b", values, every=3, kill=kill, patience=4)
    assert sorted(stopped) == [0, 3, 5]
    assert not torch.equal(stopped[5]["vectors"], kept[6]["vectors"])
    best = build("soft_prompt", lm)
    train(lm, best, tmp_path / "c", dev=Scripted(values), patience=4)
    assert not torch.equal(stopped[5]["vectors"], best.vectors), "the last, and not the best"


def test_a_training_that_patience_ended_stays_ended(lm, tmp_path):
    values = [0.5, 0.4, 0.3, 0.9, 0.9, 0.9]
    adapter, again = build("soft_prompt", lm), build("soft_prompt", lm)
    fitted = train(lm, adapter, tmp_path, dev=Scripted(values), patience=2)
    finished = train(lm, again, tmp_path, dev=Scripted(values[3:]), patience=2, resume=True)
    assert finished.steps == fitted.steps == 3
    assert (finished.history, finished.dev) == (fitted.history, fitted.dev)
    assert_equal(state(again), state(adapter))


@pytest.mark.parametrize(
    ("options", "given"),
    [({"loss": "pair", "margin": 0.9}, {"margin": 0.9}), ({"loss": "softmax", "loss_scale": 3.0}, {"scale": 3.0})],
)
def test_a_loss_gets_its_options(options, given, lm):
    adapter = build("soft_prompt", lm, trained=True)
    batch, config = batch_for(lm, adapter, **options)
    with torch.no_grad():
        out = Learner(adapter, config, scorer_for(lm, adapter))(batch)
    found = losses.LOSSES[config.loss](out["scores"], batch.mask, **given)
    assert out["loss"].item() == pytest.approx(found.item(), abs=1e-6)


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path):
    for number in (2, 9, 10):
        (tmp_path / f"checkpoint-{number}").mkdir()
        (tmp_path / f"checkpoint-{number}" / "trainer_state.json").write_text("{}")
    assert _newest(tmp_path) == str(tmp_path / "checkpoint-10")


def test_a_step_of_several_batches_finds_its_contexts_encoded(make_lm, tmp_path, monkeypatch):
    monkeypatch.setattr(contexts, "AHEAD", 4)
    lm, found = with_store(make_lm("llama")), []
    forward = Learner.forward

    def watched(self, batch):
        found.extend(lm.store.has(lm.key(row.context[: row.hint])) for row in batch.rows)
        return forward(self, batch)

    monkeypatch.setattr(Learner, "forward", watched)
    adapter = build("soft_prompt", lm)
    train(lm, adapter, tmp_path, epochs=1, batch_queries=1, negatives=1, gradient_accumulation=2)
    assert found == [True] * 8
