"""What stands at the last token: the same as one row alone, on every family, on every path."""

import pytest
import torch
from torch import nn

from qpeft.adapters import lora
from qpeft.errors import ModelError, OptionError
from qpeft.lm.read_out import Answers, Head
from qpeft.template import Prompt, Template, load_template
from reference import naive_hints, naive_read
from tiny_adapters import PASSAGES, QUERIES, alike, build, with_store

FORMS = {
    "query first": load_template("rankllama"),
    "passage first": Template("p", 1, "passage: {passage} {hint} query: {query}", end=True),
    "hint first": Template("f", 1, "given {hint} query: {query} passage: {passage}"),
    "hint last": Template("h", 1, "query: {query} passage: {passage}. {hint} what is this?"),
}


def rows_for(lm, form="query first", adapter=None):
    length = None if adapter is None else adapter.hint_length
    prompt = Prompt(FORMS[form], lm.tokenizer, lm.max_length, hint_length=length)
    return [prompt.rows(query, passage)[0] for query in QUERIES for passage in PASSAGES]


def weight(k=2):
    torch.manual_seed(5)
    return torch.randn(k, 32)


def head():
    module = nn.Linear(32, 2, bias=False)
    module.weight.data = weight()
    return Head(module)


READ = {"answers": (Answers((7, 9, 20)), (7, 9, 20)), "head": (head(), weight())}


def assert_close(found, expected, tolerance=1e-4):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), torch.as_tensor(other).double(), atol=tolerance, rtol=0)


def trained_lora(lm, seed=1, **options):
    torch.manual_seed(seed)
    adapter = lora.build(lora.Config(r=2, **options), lm)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    return adapter


@pytest.mark.parametrize("what", READ)
@pytest.mark.parametrize("form", FORMS)
def test_equals_the_naive_reference(family, make_lm, what, form):
    lm = make_lm(family)
    read_out, naive = READ[what]
    rows = rows_for(lm, form)
    expected = [naive_read(lm.model, row, naive) for row in rows]
    assert_close(lm.read(rows, read_out), expected)
    assert len({round(values[0], 3) for values in expected}) > len(rows) // 2, "or mistakes would not show"


@pytest.mark.parametrize("what", READ)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("batch_tokens", [1, 60, 4096])
def test_does_not_depend_on_batch_order_padding_or_store(family, make_lm, what, side, batch_tokens):
    lm = make_lm(family, batch_tokens=1)
    rows = rows_for(lm)
    expected = lm.read(rows, READ[what][0])
    same = alike(lm, padding_side=side, batch_tokens=batch_tokens)
    assert_close(same.read(rows[::-1], READ[what][0])[::-1], expected)
    if side == "right":
        stored = with_store(lm, batch_tokens=batch_tokens)
        assert_close(stored.read(rows, READ[what][0]), expected)
        assert stored.store.misses == 0, "what ends in the pair is not worth keeping"


@pytest.mark.parametrize("what", READ)
def test_rows_of_several_adapters(make_lm, what):
    lm = make_lm("llama")
    read_out, naive = READ[what]
    each = [trained_lora(lm), None, build("qpeft_a", lm, trained=True), build("soft_prompt", lm, trained=True)]
    rows = rows_for(lm, "passage first", each[2])
    adapters = [each[i % 4] for i in range(len(rows))]
    expected = []
    for row, adapter in zip(rows, adapters, strict=True):
        if adapter is each[0]:
            with adapter.applied():
                expected.append(naive_read(lm.model, row, naive))
        else:
            hints = None if adapter is None else naive_hints(lm.model, adapter, row)
            expected.append(naive_read(lm.model, row, naive, hints))
    assert_close(lm.read(rows, read_out, adapters=adapters), expected)
    assert abs(float(lm.read(rows[:1], read_out)[0][0]) - expected[0][0]) > 1e-3


def test_an_adapter_that_reads_states(make_lm):
    lm = with_store(make_lm("gpt2"))
    adapter = build("qpeft_c", lm, trained=True)
    rows = rows_for(lm, "passage first", adapter)
    expected = [naive_read(lm.model, row, (7, 9), naive_hints(lm.model, adapter, row)) for row in rows]
    assert_close(lm.read(rows, Answers((7, 9)), adapters=adapter), expected)
    with pytest.raises(OptionError, match="needs its hint after the passage"):
        lm.read(rows_for(lm, "hint first", adapter), Answers((7, 9)), adapters=adapter)


def test_gradients_equal_those_of_one_row_at_a_time(family, make_lm):
    lm = make_lm(family)
    adapter = trained_lora(lm)
    for what in READ:
        read_out = READ[what][0]
        trained = [*adapter.parameters(), *(read_out.module.parameters() if what == "head" else ())]
        rows = rows_for(lm)[:4]
        found = []
        for batches in ([rows], [[row] for row in rows]):
            total = sum(lm.read_batch(batch, read_out, [adapter] * len(batch)).square().sum() for batch in batches)
            found.append(torch.autograd.grad(total, trained))
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)
        assert all(gradient.abs().max() > 0 for gradient in found[0])


def test_heads_run_at_the_last_positions_only(family, make_lm):
    lm = make_lm(family)
    rows = rows_for(lm)
    seen = {"words": [], "head": []}
    read_out = head()
    for name, module in (("words", lm.model.get_output_embeddings()), ("head", read_out.module)):
        module.register_forward_hook(lambda m, i, output, name=name: seen[name].append(output.shape[:-1].numel()))
    lm.read(rows, read_out)
    assert (seen["words"], sum(seen["head"])) == ([], len(rows))
    before = lm.computed.flops
    lm.read(rows, Answers((7,)))
    assert sum(seen["words"]) == len(rows)
    more = len(rows) * (lm.shape.head - 2 * 32)
    assert lm.computed.flops - before == before + 2 * more, "the heads are counted"


def test_a_bfloat16_model(make_lm):
    lm = make_lm("llama", dtype=torch.bfloat16)
    rows = rows_for(lm)
    for read_out, _ in READ.values():
        assert {value.dtype for value in lm.read(rows, read_out)} == {torch.float32}


def test_an_encoder_decoder_answers_at_its_first_position(t5):
    prompt = Prompt(load_template("yes_no"), t5.tokenizer, 128, separate_target=True)
    rows = [prompt.rows(query, passage)[0] for query in QUERIES for passage in PASSAGES]
    assert {row.context.count(t5.tokenizer.eos_token_id) for row in rows} == {1}
    expected = []
    for row in rows:
        with torch.no_grad():
            logits = t5.model(input_ids=torch.tensor([row.context]), decoder_input_ids=torch.tensor([[0]])).logits[0, 0]
        expected.append(logits.log_softmax(0)[[7, 9]])
    assert_close(t5.read(rows, Answers((7, 9))), expected)
    with pytest.raises(ModelError, match="head on the last token is for decoder-only models"):
        t5.read(rows, head())


def test_a_classifier_predicts_no_tokens(make_lm):
    lm = alike(make_lm("llama"), has_words=False)
    rows = rows_for(lm)
    assert len(lm.read(rows, head())) == len(rows)
    with pytest.raises(ModelError, match="predicts no tokens: --method classifier"):
        lm.read(rows, Answers((7,)))
    with pytest.raises(ModelError, match="predicts no tokens"):
        lm.log_probs(rows)


def test_no_rows(make_lm):
    assert make_lm("llama").read([], head()) == []
