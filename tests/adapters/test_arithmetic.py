"""What trained adapters compute: each number equals what it is by its formula, in float64 and without their code."""

import pytest
import torch

import naive_adapters
from naive_adapters import Tables, numbers
from tiny_adapters import build, rows_for

WIDE = {"mlp_init": "default", "mlp_layers": 2, "token_table": "trainable"}
CASES = [
    ("qpeft_a", {}),
    ("qpeft_a", {"num_heads": 4, "attn_sharpness": 3.0, "hint_prefix": "the query is:", "hint_suffix": ""}),
    ("qpeft_a", {"mlp_layers": 0}),
    ("qpeft_a", {"attn_init": "default", "num_heads": 4, **WIDE}),
    ("qpeft_a", {"token_table": "trainable"}),
    ("qpeft_c", {}),
    ("qpeft_c", {"layer": 1, "num_heads": 4}),
    ("qpeft_r", {"token_filter": "d"}),
    ("qpeft_r", {"token_filter": "d", "similarity_table": "trainable", "k": 6, **WIDE}),
    ("qpeft_r", {"token_filter": "d", "token_table": "trainable", "mlp_layers": 0}),
    ("passage_prompt", {"instruction": "ask a question"}),
    ("passage_prompt", {"form": "all"}),
    ("soft_prompt", {}),
]
NAIVE = {"qpeft_c": naive_adapters.naive_qpeft_a} | {
    name.removeprefix("naive_"): function
    for name, function in vars(naive_adapters).items()
    if name.startswith("naive_")
}


@pytest.fixture(scope="module")
def lms(make_lm):
    """One model with plain embeddings, and one that scales them."""
    return {family: make_lm(family) for family in ("llama", "gemma2")}


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_vectors_are_what_their_formula_says(name, options, family, lms):
    lm = lms[family]
    adapter = build(name, lm, trained=True, **options)
    rows = rows_for(lm, adapter)
    encoded = None
    if adapter.reads_layer is not None:
        encoded = [lm.encode(row.context[: row.hint], adapter.reads_layer).states for row in rows]
    with torch.no_grad():
        hints = adapter(lm.pairs(rows, adapter, encoded))
    w = numbers(adapter)
    tables = Tables(lm, w)
    for i, row in enumerate(rows):
        passage, states = row.context[slice(*row.passage)], None
        if encoded is not None:
            states = encoded[i][slice(*row.passage)].double()
        vectors, reasons = NAIVE[name](w, adapter.config, tables, row.query, passage, states)
        found = hints.vectors[i][hints.mask[i]].double()
        torch.testing.assert_close(found, torch.stack(vectors), rtol=1e-5, atol=1e-5 * float(tables.rms))
        if hints.chosen is not None:
            assert [place for place in hints.chosen[i].tolist() if place >= 0] == reasons
        if hints.attention is not None:
            weights = hints.attention[i, : len(reasons), : len(passage)].double()
            torch.testing.assert_close(weights, torch.tensor(reasons, dtype=torch.float64), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_every_parameter_has_a_gradient(name, options, lms):
    lm = lms["llama"]
    adapter = build(name, lm, trained=True, **options).train()
    rows = rows_for(lm, adapter)
    values, _ = lm.score(rows, [adapter] * len(rows))
    values.sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in adapter.parameters())
