"""What holds of every adapter."""

import dataclasses
import types
from dataclasses import replace
from importlib.metadata import EntryPoint

import pytest
import torch

from qpeft import adapters
from qpeft.adapter import Hints, Pairs, PromptAdapter
from qpeft.adapters import qpeft_a, soft_prompt
from qpeft.adapters._folder import load_adapter, save_adapter
from qpeft.errors import OptionError, QueryError
from qpeft.lm.hints import Slots
from qpeft.template import Prompt, load_template
from qpeft.types import Passage, Query
from reference import naive_hinted_log_probs, naive_hints, naive_log_probs
from tiny_adapters import BEFORE, CHANGES_THE_MODEL, NAMES, QUERIES, alike, rows_for, with_store
from tiny_adapters import build as build_adapter
from tiny_models import FAMILIES

CASES = {name: (name, {}) for name in NAMES} | {
    "qpeft_a beside a soft prompt": ("qpeft_a", {"soft_length": 3}),
    "qpeft_r beside a soft prompt": ("qpeft_r", {"soft_length": 3}),
    "passage_prompt of all tokens": ("passage_prompt", {"form": "all", "most": 6}),
}
READ_STATES = {"qpeft_c"}


def build(case, lm, **options):
    name, own = CASES[case]
    return build_adapter(name, lm, **(own | options))


@pytest.fixture(scope="module")
def models(make_lm):
    """One model of each family, float32; no test changes them."""
    return {family: make_lm(family) for family in FAMILIES}


@pytest.fixture
def forgetting():
    """Adapters that a test registers are not known to others."""
    yield
    adapters._registry.registered.clear()


@pytest.fixture(params=CASES)
def name(request):
    return request.param


def means(values):
    return torch.stack([value.target.double().mean() for value in values])


def references(lm, adapter, rows):
    """Return what the rows should get, one mean each."""
    expected = [naive_hinted_log_probs(lm.model, row, naive_hints(lm.model, adapter, row)) for row in rows]
    return torch.tensor([sum(values) / len(values) for values in expected], dtype=torch.float64)


def assert_close(found, expected, tolerance=1e-4):
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", adapters.available())
def test_the_registry(name):
    module = adapters.load(name)
    assert adapters.load(name.replace("_", "-")) is module
    for config in (module.Config, getattr(module, "Authors", module.Config)):
        assert dataclasses.is_dataclass(config)
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config(), dataclasses.fields(config)[0].name, 1)
        assert issubclass(config, module.Config)
    assert callable(module.build)


def test_plug_ins_of_other_packages_under_any_spelling(monkeypatch):
    entry = EntryPoint("my-own", "qpeft.adapters.soft_prompt", "qpeft.adapters")
    monkeypatch.setattr("qpeft.registry.entry_points", lambda group: [entry] if group == entry.group else [])
    assert "my_own" in adapters.available()
    assert adapters.load("my-own") is adapters.load("my_own") is adapters.load("soft_prompt")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("qpeft.adapters.nowhere", "'mine': qpeft.adapters.nowhere cannot be imported: No module named"),
        ("qpeft.adapters.lora:nothing", "'mine': qpeft.adapters.lora:nothing cannot be imported: .*'nothing'"),
        ("qpeft.adapters._card", "'mine': qpeft.adapters._card has no 'Config'"),
    ],
)
def test_plug_ins_that_are_none_are_named(value, words, monkeypatch):
    entries = [EntryPoint("mine", value, "qpeft.adapters"), EntryPoint("qpeft-a", value, "qpeft.adapters")]
    monkeypatch.setattr("qpeft.registry.entry_points", lambda group: entries)
    with pytest.raises(OptionError, match=f"adapter {words}"):
        adapters.load("mine")
    assert adapters.load("qpeft-a") is qpeft_a, "a name of qpeft's own means its own"


def test_an_adapter_that_is_registered_is_saved_and_opened(make_lm, tmp_path, forgetting):
    with pytest.raises(OptionError, match="adapter 'qpeft_a' is one of qpeft's"):
        adapters.register("qpeft-a", soft_prompt)
    with pytest.raises(OptionError, match="adapter 'mine': types has no 'Config'"):
        adapters.register("mine", types)

    class Own(PromptAdapter):
        changes_lm = True  # of its own accord, and nothing for PEFT to open

        def __init__(self, lm):
            super().__init__(lm)
            self.vectors = torch.nn.Parameter(torch.randn(2, self.width))

        def hint_length(self, query_tokens):
            return 2

        def forward(self, pairs):
            vectors = self.vectors.expand(len(pairs.query), -1, -1)
            return Hints(vectors, torch.ones(vectors.shape[:2], dtype=torch.bool))

    own = types.SimpleNamespace(Config=soft_prompt.Config, build=lambda config, lm: Own(lm))
    adapters.register("mine", own)
    assert "mine" in adapters.available()
    lm = make_lm("llama")
    adapter = adapters.build("mine", soft_prompt.Config(length=2), lm).eval()
    save_adapter(tmp_path / "a", "mine", adapter, lm, load_template("plain"))
    opened = load_adapter(tmp_path / "a", lm)
    rows = rows_for(lm, adapter)
    assert (opened.name, opened.adapter.config) == ("mine", soft_prompt.Config(length=2))
    assert torch.equal(means(lm.log_probs(rows, adapters=opened.adapter)), means(lm.log_probs(rows, adapters=adapter)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda hints: replace(hints, mask=hints.mask.long()), r"SoftPrompt wrote a mask of torch.int64; it is torch"),
        (lambda hints: replace(hints, mask=hints.mask[:, :1]), r"vectors \[1, 5, 32\] and a mask \[1, 1\] for 1 rows"),
        (lambda hints: replace(hints, vectors=hints.vectors[0]), r"vectors \[5, 32\] and a mask \[1, 5\] for 1 rows"),
        (lambda hints: replace(hints, vectors=hints.vectors.repeat(1, 1, 2)), r"vectors of 64; they are of 32"),
    ],
)
def test_hints_of_another_shape_are_refused(change, words, models):
    lm = models["llama"]
    adapter = build_adapter("soft_prompt", lm)
    rows = rows_for(lm, adapter)[:1]
    forward = adapter.forward
    adapter.forward = lambda pairs: change(forward(pairs))
    with pytest.raises(OptionError, match=words):
        lm.log_probs(rows, adapters=adapter)


def test_nothing_is_skipped_by_mistake():
    assert set(adapters.available()) - set(NAMES) <= CHANGES_THE_MODEL
    with pytest.raises(OptionError, match="unknown adapter 'qpeft_q'; did you mean 'qpeft_"):
        adapters.load("qpeft-q")


def test_scores_equal_the_naive_reference(family, name, models):
    lm = models[family]
    adapter = build(name, lm, trained=True)
    rows = rows_for(lm, adapter)
    expected = references(lm, adapter, rows)
    assert_close(means(lm.log_probs(rows, adapters=adapter)), expected)
    without = means(lm.log_probs(rows))
    assert (expected - without).abs().mean() > 0.01, "hints without influence would hide mistakes"


@pytest.mark.parametrize("template", ["upr", "qpeft"])
def test_words_after_the_hint_and_scored_ends(name, models, template):
    lm = models["gpt2"]
    adapter = build(name, lm, trained=True)
    rows = rows_for(lm, adapter, template)
    assert all(row.hint is not None for row in rows)
    expected = references(lm, adapter, rows)
    for each in (lm, with_store(lm)):
        assert_close(means(each.log_probs(rows, adapters=adapter)), expected)


def test_scores_do_not_depend_on_batch_padding_or_store(family, name, models):
    lm = models[family]
    adapter = build(name, lm, trained=True)
    rows = rows_for(lm, adapter)
    alone = torch.cat([means(lm.log_probs([row], adapters=adapter)) for row in rows])
    stored = with_store(lm)
    others = [alike(lm, batch_tokens=batch, padding_side=side) for batch in (60, 4096) for side in ("left", "right")]
    for other in (*others, stored, with_store(lm, batch_tokens=60), stored):
        assert_close(means(other.log_probs(rows[::-1], adapters=adapter)).flip(0), alone)
    assert stored.store.hits


def test_hints_stay_within_their_length(name, models):
    lm = models["llama"]
    adapter = build(name, lm)
    longest = 0
    for row in rows_for(lm, adapter):
        bound = adapter.hint_length(len(row.query))
        length = len(naive_hints(lm.model, adapter, row))
        assert 0 < length <= bound
        longest = max(longest, length / bound)
    assert longest == 1, "a bound that is never reached wastes room"


def test_more_vectors_than_said_are_refused(name, models):
    lm = models["llama"]
    adapter = build(name, lm)
    rows = rows_for(lm, adapter)
    most = max(len(naive_hints(lm.model, adapter, row)) for row in rows)
    adapter.hint_length = lambda query_tokens: most - 1
    with pytest.raises(OptionError, match=rf"{type(adapter).__name__} wrote {most} vectors, but .* at most {most - 1}"):
        lm.log_probs(rows, adapters=adapter)


def test_rows_with_their_hints_fit_the_model(name, make_lm):
    lm = make_lm("gpt2")
    adapter = build(name, lm)
    long = Passage("long", "the sea " * 200)
    (row,) = rows_for(lm, adapter, queries=QUERIES[:1], passages=[long])
    assert row.truncated
    assert len(row) + adapter.hint_length(len(row.query)) == lm.max_length
    assert torch.isfinite(means(lm.log_probs([row], adapters=adapter))).all()
    room = len(rows_for(lm, adapter, passages=[Passage("none", "")])[0]) + adapter.hint_length(len(row.query))
    tight = Prompt(load_template("plain"), lm.tokenizer, room, hint_length=adapter.hint_length)
    with pytest.raises(QueryError, match="query 'q1' needs"):
        tight.rows(QUERIES[0], long)


def test_hints_count_in_the_tokens_of_a_batch(name, models):
    lm = alike(models["llama"], batch_tokens=200)
    adapter = build(name, lm)
    seen = []
    hook = lm.model.register_forward_pre_hook(
        lambda module, inputs, options: seen.append(options.get("inputs_embeds")), with_kwargs=True
    )
    lm.log_probs(rows_for(lm, adapter), adapters=adapter)
    hook.remove()
    sizes = [len(vectors) * (vectors.shape[1] + 1) for vectors in seen if vectors is not None]
    assert len(sizes) > 1
    assert max(sizes) <= 200


def padded(lm, adapter, seed):
    """Return pairs of three rows of unlike lengths, and what stands in their padding, drawn by a seed."""
    rows = rows_for(lm, adapter)[:3]
    encoded = None
    if adapter.reads_layer is not None:
        encoded = [lm.encode(row.context[: row.hint], adapter.reads_layer).states for row in rows]
    pairs = lm.pairs(rows, adapter, encoded)
    generator = torch.Generator().manual_seed(seed)

    def refill(values, mask):
        noise = torch.randint(3, 90, values.shape, generator=generator).to(values.dtype)
        return torch.where(mask if values.ndim == 2 else mask[..., None], values, noise)

    wide = [torch.nn.functional.pad(part, (0, 3)) for part in (pairs.query, pairs.query_mask)]
    passage, mask = (torch.nn.functional.pad(part, (0, 4)) for part in (pairs.passage, pairs.passage_mask))
    states = None if pairs.states is None else refill(torch.nn.functional.pad(pairs.states, (0, 0, 0, 4)), mask)
    return Pairs(refill(*wide), wide[1], refill(passage, mask), mask, states)


VARIANTS = [(name, {}) for name in CASES] + [
    ("qpeft_r", {"select": "random", "token_filter": "dq"}),
    ("qpeft_r", {"select": "random", "select_seed": 2}),
    ("qpeft_r", {"token_filter": ""}),
    ("qpeft_a", {"token_filter": "qs"}),
    ("qpeft_a", {"attn_init": "default"}),
    ("passage_prompt", {"form": "all"}),
]


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_padding_has_no_influence(name, options, models):
    lm = models["llama"]
    adapter = build(name, lm, trained=True, **options)
    first, *others = (padded(lm, adapter, seed) for seed in range(6))
    one = Slots.of(adapter(first))
    for pairs in others:
        assert not torch.equal(first.passage, pairs.passage)
        other = Slots.of(adapter(pairs))
        assert one.lengths == other.lengths
        assert torch.equal(one.vectors, other.vectors)


def test_only_the_adapter_is_trained(family, name, make_lm):
    lm = make_lm(family)
    before = {key: tensor.clone() for key, tensor in lm.model.state_dict().items()}
    adapter = build(name, lm).train()
    start = {key: tensor.clone() for key, tensor in adapter.state_dict().items()}
    rows = rows_for(lm, adapter)[:4]
    scorer = with_store(lm)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        values, _ = scorer.score(rows, [adapter] * len(rows))
        loss = -values.mean()
        loss.backward()
        assert any(p.grad is not None and p.grad.abs().max() > 0 for p in adapter.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert all(p.grad is None and not p.requires_grad for p in lm.model.parameters())
    assert all(torch.equal(before[key], tensor) for key, tensor in lm.model.state_dict().items())
    assert any(not torch.equal(start[key], tensor) for key, tensor in adapter.state_dict().items())
    assert losses[-1] < losses[0]


def test_the_model_is_no_part_of_the_adapter(name, models):
    lm = models["llama"]
    adapter = build(name, lm)
    assert adapter.count_parameters() == sum(p.numel() for p in adapter.parameters())
    shared = {p.data_ptr() for p in lm.model.parameters()} & {p.data_ptr() for p in adapter.state_dict().values()}
    assert not shared


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_float32_adapter_on_a_bfloat16_model(name, family, make_lm):
    lm = make_lm(family, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in lm.model.parameters():
            if parameter.ndim > 1:
                parameter.div_(4)
    adapter = build(name, lm, trained=True)
    assert {parameter.dtype for parameter in adapter.parameters()} == {torch.float32}
    rows = rows_for(lm, adapter)
    for each in (lm, with_store(lm)):
        assert_close(means(each.log_probs(rows, adapters=adapter)), references(lm, adapter, rows), tolerance=0.05)
    values, _ = lm.score(rows, [adapter] * len(rows))
    values.mean().backward()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in adapter.parameters())
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in adapter.parameters())


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_save_and_load(name, family, make_lm, tmp_path):
    lm = make_lm(family)
    adapter = build(name, lm, seed=3, trained=True)
    rows = rows_for(lm, adapter)
    save_adapter(tmp_path / "a", CASES[name][0], adapter, lm, load_template("plain"), max_passage_tokens=7)
    fresh = make_lm(family)
    opened = load_adapter(tmp_path / "a", fresh)
    assert (opened.name, opened.template, opened.max_passage_tokens) == (CASES[name][0], load_template("plain"), 7)
    assert opened.adapter.config == adapter.config
    assert not any(parameter.requires_grad for parameter in opened.adapter.parameters())
    found, expected = fresh.log_probs(rows, adapters=opened.adapter), lm.log_probs(rows, adapters=adapter)
    assert torch.equal(means(found), means(expected))


@pytest.mark.parametrize("stored", [False, True])
def test_a_batch_may_mix_adapters(models, stored):
    lm = models["qwen3"]
    made = [build(name, lm, trained=True) for name in CASES]
    scorer = with_store(lm) if stored else lm
    widest = max(made, key=lambda adapter: adapter.hint_length(9))
    rows = rows_for(lm, widest)
    each = [(adapter, row) for row in rows for adapter in (*made, None)]
    together = means(scorer.log_probs([row for _, row in each], adapters=[adapter for adapter, _ in each]))
    alone = torch.cat([means(lm.log_probs([row], adapters=adapter)) for adapter, row in each])
    assert_close(together, alone)


def test_every_kind_of_tokenizer(name, tokenizer, models):
    lm = alike(models["llama"], tokenizer=tokenizer)
    adapter = build(name, lm, trained=True)
    rows = rows_for(lm, adapter, passages=[Passage("a", "The sea, why?"), Passage("b", "w")])
    expected = references(lm, adapter, rows)
    for each in (lm, with_store(lm)):
        assert_close(means(each.log_probs(rows, adapters=adapter)), expected)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mistral"])
def test_a_hint_before_the_passage(name, family, models):
    lm = models[family]
    adapter = build(name, lm, trained=True)
    rows = rows_for(lm, adapter, BEFORE)
    assert all(row.hint < row.passage[0] for row in rows)
    if name in READ_STATES:
        with pytest.raises(OptionError, match="needs its hint after the passage"):
            lm.log_probs(rows, adapters=adapter)
        return
    expected = references(lm, adapter, rows)
    for each in (lm, alike(lm, padding_side="right"), with_store(lm)):
        assert_close(means(each.log_probs(rows, adapters=adapter)), expected)


def test_the_passages_own_likelihood(name, models):
    lm = models["llama"]
    adapter = build(name, lm, trained=True)
    for template in ("plain",) if name in READ_STATES else ("plain", BEFORE):
        rows = rows_for(lm, adapter, template)
        values = lm.log_probs(rows, with_passage=True, adapters=adapter)
        assert_close(means(values), references(lm, adapter, rows))
        for row, value in zip(rows, values, strict=True):
            inside = dataclasses.replace(
                row, target=row.context[row.passage[0] : row.passage[1]], context=row.context[: row.passage[0]]
            )
            inside = dataclasses.replace(inside, scored=(True,) * len(inside.target))
            if row.hint > row.passage[0]:
                expected = naive_log_probs(lm.model, inside)[0]  # what comes later has no influence
            else:
                expected = naive_hinted_log_probs(lm.model, inside, naive_hints(lm.model, adapter, row))
            assert_close(value.passage.double(), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("template", ["plain", "qpeft"])
@pytest.mark.parametrize("stored", [False, True])
def test_odd_texts(name, models, template, stored):
    lm = with_store(models["llama"]) if stored else models["llama"]
    adapter = build(name, lm, trained=True)
    texts = ["", "sky", "the of in is", "éàü ✓ 水", "the sky is blue", "the sky is blue", "[SEP]", "? ? ?"]
    passages = [Passage(str(i), text) for i, text in enumerate(texts)]
    rows = rows_for(lm, adapter, template, queries=[Query("q", "水 sky"), Query("r", "the")], passages=passages)
    found = means(lm.log_probs(rows, adapters=adapter))
    assert torch.isfinite(found).all()
    assert_close(found[4], found[5])
    alone = torch.cat([means(lm.log_probs([row], adapters=adapter)) for row in rows])
    assert_close(found, alone)
    values, _ = lm.score(rows, [adapter] * len(rows))
    values.mean().backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in adapter.parameters())
