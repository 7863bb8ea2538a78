import pytest
import torch
from test_causal import PASSAGES, QUERY, rows_for
from torch.utils.flop_counter import FlopCounterMode
from transformers import MambaConfig, MambaForCausalLM

from qpeft.lm.encoding import ContextEncoder
from qpeft.lm.flops import attended, decoder_flops, encoder_decoder_flops, shape_of
from qpeft.methods.query_likelihood import Config, build_scorer
from qpeft.template import Prompt, load_template
from reference import naive_hints
from tiny_adapters import alike, with_store
from tiny_adapters import build as build_adapter
from tiny_adapters import rows_for as hinted_rows
from tiny_models import FAMILIES, SMALL

LAYERS, WIDTH = SMALL["num_hidden_layers"], 32
"""Of all families: query heads × head size is 32."""
WINDOWS = {family: (None, None) for family in FAMILIES} | {"mistral": (12, 12), "gemma2": (12, None)}


pytestmark = pytest.mark.usefixtures("one_thread", "no_rounding")  # torch counts within the calling thread


def counted(model, run):
    """Return torch's count for what `run` does: matrix products, and attention's batched ones."""
    model.set_attn_implementation("eager")
    model.config._experts_implementation = "eager"  # torch does not count the grouped kernel
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        run()
    found = {str(name): flops for name, flops in counter.get_flop_counts()["Global"].items()}
    attention = found.pop("aten.bmm", 0)
    return sum(found.values()), attention


def attention(rows, windows=(None,) * LAYERS):
    """Return the FLOPs of attention through the window of each layer: two products of 2 · width for each pair."""
    return sum(4 * WIDTH * attended(*row, window) for row in rows for window in windows)


def whole_square(rows, layers=LAYERS):
    """Return the FLOPs of attention as a kernel without windows or causality has them."""
    return sum(4 * WIDTH * layers * tokens * (before + tokens) for tokens, before in rows)


def test_a_forward_pass_equals_torchs_count(family, make_lm):
    model = make_lm(family).model
    shape = shape_of(model)
    for tokens in (1, 11):  # not above the sliding windows
        ids = torch.arange(3, 3 + tokens)[None]
        keep = torch.zeros_like(ids).bool()
        keep[0, -2:] = True
        products, square = counted(model, lambda ids=ids, keep=keep: model(input_ids=ids, logits_to_keep=keep))
        rows = [(tokens, 0)]
        assert square == whole_square(rows)
        assert decoder_flops(shape, rows, min(2, tokens)) == products + attention(rows)
        assert attention(rows) / square == pytest.approx((tokens + 1) / (2 * tokens))


def test_attended_equals_counting_one_by_one():
    for tokens in range(6):
        for before in range(6):
            for window in (None, 1, 3, 4, 20):
                expected = sum(min(before + place, window or 100) for place in range(1, tokens + 1))
                assert attended(tokens, before, window) == expected


def test_windows_are_those_of_the_layers(make_lm):
    shapes = {family: shape_of(make_lm(family).model) for family in FAMILIES}
    assert {family: tuple(layer.window for layer in shape.layers) for family, shape in shapes.items()} == WINDOWS


@pytest.fixture
def contexts_alone(monkeypatch):
    """Encode contexts without padding, so that what is computed can be told from their lengths."""
    monkeypatch.setattr(ContextEncoder, "_alike_shape", lambda self, length: (1, length))


@pytest.mark.parametrize("kept", [False, True], ids=["whole", "kept"])
def test_scoring_counts_what_it_computes(family, make_lm, kept, contexts_alone):
    lm = make_lm(family)
    lm = with_store(lm, batch_tokens=1) if kept else alike(lm, batch_tokens=1)
    rows, windows = [rows_for(lm)[i] for i in (0, 1, 5)], WINDOWS[family]  # the last two share their context
    products, square = counted(lm.model, lambda: lm.log_probs(rows))
    contexts, computed = [], [(len(row) - 1, 0) for row in rows]
    if kept:
        contexts = [(count, 0) for count in map(len, {row.context for row in rows})]
        # the last token of a context is computed with the query, to predict its first
        computed = [(len(row.target), len(row.context) - 1) for row in rows]
    last = computed if kept else [(sum(row.scored), len(row) - 1 - sum(row.scored)) for row in rows]
    # contexts are encoded up to the last layer's keys and values, so without its attention; whole rows go on from there
    # where a token is predicted
    assert square == whole_square(contexts, LAYERS - 1) + whole_square(computed, LAYERS - 1) + whole_square(last, 1)
    below = attention(contexts, windows[:-1]) + attention(computed, windows[:-1]) + attention(last, windows[-1:])
    assert lm.computed.flops == products + below
    assert lm.computed.tokens == sum(count for count, _ in [*contexts, *computed])
    assert lm.computed.padding == 0
    before = lm.computed.flops
    products, _ = counted(lm.model, lambda: lm.log_probs(rows))
    expected = products + attention(computed, windows[:-1]) + attention(last, windows[-1:])
    assert lm.computed.flops - before == expected, "contexts that are kept are not computed again"


def test_padding_is_counted_apart(make_lm):
    lm = make_lm("llama")
    rows = rows_for(lm)[:4]
    alone = alike(lm, batch_tokens=1)
    for each in (lm, alone):
        each.log_probs(rows)
    assert lm.computed.padding == sum(max(map(len, rows)) - len(row) for row in rows) > 0
    assert (lm.computed.tokens, lm.computed.flops) == (alone.computed.tokens, alone.computed.flops)


@pytest.mark.parametrize("name", ["soft_prompt", "qpeft_c"])
def test_hints_count_as_tokens(make_lm, name):
    lm = alike(make_lm("qwen3"), batch_tokens=1)
    adapter = build_adapter(name, lm)
    (row,) = hinted_rows(lm, adapter, queries=[QUERY], passages=PASSAGES[:1])
    lm.log_probs([row], adapters=adapter)
    assert lm.computed.tokens == len(row) - 1 + len(naive_hints(lm.model, adapter, row))


def test_reading_states_takes_a_whole_pass(make_lm):
    lm = make_lm("qwen3")
    (row,) = rows_for(lm, queries=[QUERY])[:1]
    products, square = counted(lm.model, lambda: lm.encode(row.context, 1))
    rows = [(len(row.context), 0)]
    assert lm.computed.flops == products + square - whole_square(rows) + attention(rows)


@pytest.mark.parametrize("kept", [False, True], ids=["whole", "kept"])
def test_fewer_layers_take_less(make_lm, kept, contexts_alone):
    lm = make_lm("gpt2")
    lm = with_store(lm, batch_tokens=1) if kept else alike(lm, batch_tokens=1)
    rows = rows_for(lm)[:2]
    products, square = counted(lm.model, lambda: lm.log_probs(rows, depth=1))
    computed = [(len(row.target), len(row.context) - 1) if kept else (len(row) - 1, 0) for row in rows]
    assert square == whole_square(computed, 1)
    assert lm.computed.flops == products + attention(computed, [None])


def test_an_encoder_decoder_equals_torchs_count(t5):
    before = t5.computed.flops
    build_scorer(Config(template="upr"), t5).score([(QUERY, PASSAGES[1])])
    found = t5.computed.flops - before
    (row,) = Prompt(load_template("upr"), t5.tokenizer, 128, separate_target=True).rows(QUERY, PASSAGES[1])
    context, target = len(row.context), len(row.target)
    products, square = counted(t5.model, lambda: t5.log_probs([row]))
    assert square == 4 * WIDTH * LAYERS * (context**2 + target**2 + context * target)
    triangle = target * (target + 1) // 2
    assert found == products + 4 * WIDTH * LAYERS * (context**2 + triangle + context * target)
    assert found == encoder_decoder_flops(t5.shape, [(context, target)])


def test_lora_does_not_hide_layers(make_lm):
    pytest.importorskip("peft")
    lm = make_lm("llama")
    before = shape_of(lm.model)
    build_adapter("lora", lm)
    assert shape_of(lm.model) == before


def test_a_model_without_heads_has_no_shape():
    config = MambaConfig(vocab_size=320, hidden_size=32, num_hidden_layers=1, state_size=4)
    assert shape_of(MambaForCausalLM(config)) is None


def test_padding_of_contexts_is_counted_apart(make_lm):
    lm, seen = with_store(make_lm("llama")), []
    lm.model.register_forward_pre_hook(lambda _, args, given: seen.append(given["input_ids"].numel()), with_kwargs=True)
    lm.encode_all([(1, *range(3, 7)), (1, *range(3, 12))])
    assert lm.computed.tokens == 5 + 10
    assert lm.computed.padding == sum(seen) - 15 > 0
