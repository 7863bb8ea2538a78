import pytest
import torch

from qpeft.errors import ModelError
from qpeft.lm import pretrained
from qpeft.lm.causal import MULTIPLE, CausalLM, token_log_probs
from qpeft.lm.layout import few_sizes
from qpeft.template import Prompt, Template, load_template
from qpeft.types import Passage, Query
from reference import naive_log_probs

QUERY = Query("q1", "why is the sky blue?")
QUERIES = (QUERY, Query("q2", "who"))
PASSAGES = [
    Passage("short", "the sky."),
    Passage(
        "long", "the light of the sky is blue, the sea is salty, and the moon made the tide in the water of the sea"
    ),
    Passage("titled", "an octopus was long", "octopus"),
    Passage("other", "the old king of the city was in the river, the new king on the lake"),
]


def rows_for(lm, template="plain", queries=QUERIES):
    prompt = Prompt(load_template(template), lm.tokenizer, lm.max_length)
    return [prompt.rows(query, passage)[0] for query in queries for passage in PASSAGES]


def assert_close(values, references, tolerance=1e-4):
    for value, reference in zip(values, references, strict=True):
        torch.testing.assert_close(
            value.target.double(), torch.tensor(reference[0], dtype=torch.float64), atol=tolerance, rtol=0
        )


@pytest.mark.parametrize("template", ["plain", "upr", "qpeft"])
def test_scores_equal_the_naive_reference(family, make_lm, template):
    lm = make_lm(family)
    rows = rows_for(lm, template)
    references = [naive_log_probs(lm.model, row) for row in rows]
    assert_close(lm.log_probs(rows), references)
    spread = {round(sum(target) / len(target), 3) for target, _ in references}
    assert len(spread) > len(rows) // 2, "a model that scores all rows alike would hide mistakes"


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("batch_tokens", [1, 60, 4096])
def test_scores_do_not_depend_on_batch_order_or_padding(family, make_lm, side, batch_tokens):
    alone = make_lm(family, batch_tokens=1)
    lm = make_lm(family, batch_tokens=batch_tokens, padding_side=side)
    rows = rows_for(lm)
    expected = [value.target for value in alone.log_probs(rows)]
    for value, reference in zip(lm.log_probs(rows[::-1])[::-1], expected, strict=True):
        torch.testing.assert_close(value.target, reference, atol=1e-4, rtol=0)


def test_passage_log_probs_equal_the_reference(family, make_lm):
    lm = make_lm(family)
    rows = rows_for(lm)
    for row, value in zip(rows, lm.log_probs(rows, with_passage=True), strict=True):
        target, passage = naive_log_probs(lm.model, row)
        torch.testing.assert_close(value.passage.double(), torch.tensor(passage).double(), atol=1e-4, rtol=0)
        torch.testing.assert_close(value.target.double(), torch.tensor(target).double(), atol=1e-4, rtol=0)


def test_passage_without_bos_leaves_out_its_first_token(make_lm):
    lm = make_lm("llama")
    lm.tokenizer.bos_token = None
    template = Template("bare", 1, "{passage}", "{query}")
    row = Prompt(template, lm.tokenizer, 64).rows(QUERY, PASSAGES[1])[0]
    assert row.passage[0] == 0
    (value,) = lm.log_probs([row], with_passage=True)
    target, passage = naive_log_probs(lm.model, row)
    assert len(value.passage) == len(passage) == row.passage[1] - 1
    torch.testing.assert_close(value.passage.double(), torch.tensor(passage).double(), atol=1e-4, rtol=0)
    torch.testing.assert_close(value.target.double(), torch.tensor(target).double(), atol=1e-4, rtol=0)


def test_bfloat16_stays_near_float32(family, make_lm):
    exact, rounded = make_lm(family), make_lm(family, dtype=torch.bfloat16)
    for lm in (exact, rounded):
        with torch.no_grad():
            for parameter in lm.model.parameters():
                if parameter.ndim > 1:
                    parameter.div_(4)
    rows = rows_for(exact)
    for one, other in zip(exact.log_probs(rows), rounded.log_probs(rows), strict=True):
        assert abs(float(one.target.mean() - other.target.mean())) <= 0.02


def test_the_head_runs_at_scored_positions_only(family, make_lm):
    lm = make_lm(family)
    rows = rows_for(lm)
    seen = []
    hook = lm.model.get_output_embeddings().register_forward_hook(
        lambda module, inputs, output: seen.append(output.shape[:-1].numel())
    )
    lm.log_probs(rows)
    hook.remove()
    assert sum(seen) == sum(sum(row.scored) for row in rows)


class ForgetfulModel(torch.nn.Module):
    """A model on a machine whose memory holds so many rows."""

    def __init__(self, model, most, error=None):
        super().__init__()
        self.model, self.most, self.refused, self.rows = model, most, 0, 0
        self.error = error or torch.OutOfMemoryError("out of memory")
        self.device, self.dtype, self.config = model.device, model.dtype, model.config
        self._is_stateful = model._is_stateful

    def forward(self, **inputs):
        if len(inputs["input_ids"]) > self.most:
            self.refused += 1
            raise self.error
        self.rows = len(inputs["input_ids"])
        return self.model(**inputs)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("MPS backend out of memory (MPS allocated: 6.04 GiB, max allowed: 6.77 GiB)."),
    ],
)
def test_batches_shrink_when_memory_runs_out(make_lm, error):
    plain = make_lm("llama")
    rows = rows_for(plain)
    model = ForgetfulModel(plain.model, most=2, error=error)
    lm = CausalLM(model, plain.tokenizer, name="small machine", max_length=128, batch_tokens=4096)
    for value, reference in zip(lm.log_probs(rows), plain.log_probs(rows), strict=True):
        torch.testing.assert_close(value.target, reference.target, atol=1e-4, rtol=0)
    refused = model.refused
    assert refused > 0
    model.most = len(rows)
    for _ in range(4):
        lm.log_probs(rows)
    assert model.refused == refused
    assert model.rows == len(rows), "batches grow back"


def test_a_row_that_never_fits_is_an_error(make_lm):
    plain = make_lm("llama")
    lm = CausalLM(ForgetfulModel(plain.model, 0), plain.tokenizer, name="x", max_length=128, batch_tokens=4096)
    with pytest.raises(ModelError, match="tokens do not fit in the memory"):
        lm.log_probs(rows_for(plain))


def test_other_errors_are_not_taken_for_it(make_lm):
    plain = make_lm("llama")
    model = ForgetfulModel(plain.model, 0, RuntimeError("no such operation"))
    with pytest.raises(RuntimeError, match="no such operation"):
        CausalLM(model, plain.tokenizer, name="x", max_length=128, batch_tokens=4096).log_probs(rows_for(plain))
    assert model.refused == 1


def test_encoder_decoder_equals_transformers_own_loss(t5):
    prompt = Prompt(load_template("upr"), t5.tokenizer, 128, separate_target=True)
    rows = [prompt.rows(QUERY, passage)[0] for passage in PASSAGES]
    assert rows[0].target[-1] == t5.tokenizer.eos_token_id
    assert all(all(row.scored) for row in rows), "UPR scores the cue and the end too"
    for row, value in zip(rows, t5.log_probs(rows), strict=True):
        with torch.inference_mode():
            loss = t5.model(input_ids=torch.tensor([row.context]), labels=torch.tensor([row.target])).loss
        assert float(-value.target.mean()) == pytest.approx(float(loss), abs=1e-4)
    with pytest.raises(ModelError, match="no probability of the passage"):
        t5.log_probs(rows, with_passage=True)


def test_token_log_probs_in_chunks_equal_log_softmax():
    torch.manual_seed(1)
    logits, tokens = torch.randn(37, 50) * 5, torch.randint(50, (37,))
    expected = logits.double().log_softmax(1)[torch.arange(37), tokens]
    torch.testing.assert_close(token_log_probs(logits, tokens).double(), expected, atol=1e-5, rtol=0)
    assert token_log_probs(logits[:0], tokens[:0]).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_log_probabilities_are_those_of_the_whole_softmax(dtype):
    torch.manual_seed(0)
    logits = torch.randn(37, 20_000, dtype=dtype) * 4
    tokens, weights = torch.randint(0, 20_000, (37,)), torch.randn(37)
    found = []
    for compute in (token_log_probs, lambda some, chosen: some.double().log_softmax(1)[torch.arange(37), chosen]):
        leaf = logits.clone().requires_grad_()
        (compute(leaf, tokens) * weights).sum().backward()
        found.append(leaf.grad.double())
    torch.testing.assert_close(*found, atol=1e-6, rtol=1e-5 if dtype == torch.float32 else 1e-2)


def test_scoring_leaves_the_model_untouched(make_lm):
    lm = make_lm("llama")
    before = {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}
    lm.log_probs(rows_for(lm))
    assert all(torch.equal(before[name], tensor) for name, tensor in lm.model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in lm.model.parameters())


@pytest.mark.usefixtures("one_thread")
def test_the_head_writes_no_more_than_is_allowed(make_lm, monkeypatch):
    lm = make_lm("llama")
    rows = rows_for(lm)
    references = [value.target for value in lm.log_probs(rows)]
    written = []
    lm.model.get_output_embeddings().register_forward_hook(lambda *call: written.append(call[-1].numel()))
    lm.log_probs(rows)
    assert len(written) == 1
    monkeypatch.setattr(pretrained, "LOGITS", max(written) // 3)
    for value, reference in zip(lm.log_probs(rows), references, strict=True):
        torch.testing.assert_close(value.target, reference, atol=1e-5, rtol=0)
    assert max(written[1:]) <= written[0] // 3


def test_widths_are_multiples_so_that_few_kernels_are_compiled(make_lm):
    lm = make_lm("llama", batch_tokens=1)
    widths = set()
    embeddings = lm.model.get_input_embeddings()
    embeddings.register_forward_hook(lambda _, given, out: widths.add(given[0].shape[1]))
    rows = rows_for(lm)
    lm.log_probs(rows)
    assert len({len(row) for row in rows}) > len(widths)
    assert all(width % MULTIPLE == 0 for width in widths)


@pytest.mark.usefixtures("one_thread")
def test_batches_have_like_numbers_of_rows_so_that_few_kernels_are_compiled(make_lm):
    lm = make_lm("llama")
    rows = rows_for(lm) * 3
    lm.batch_tokens = 11 * max(map(len, rows))
    counts = []
    lm.model.get_input_embeddings().register_forward_hook(lambda _, given, out: counts.append(given[0].shape[0]))
    lm.log_probs(rows)
    assert len(counts) > 1
    assert sum(counts) == len(rows)
    assert all(count % pretrained.ALIKE == 0 for count in counts[:-1])


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 100, 129, 255, 999])
def test_the_head_is_given_few_sizes(count):
    wanted = torch.zeros(40, 25, dtype=torch.bool)
    wanted.view(-1)[torch.randperm(1000, generator=torch.Generator().manual_seed(count))[:count]] = True
    kept, real = few_sizes(wanted)
    assert kept[wanted].all()
    assert kept.sum() == len(real) < count + max(1, count / 8)
    assert torch.equal(kept.nonzero()[real], wanted.nonzero())


def test_the_head_has_eight_sizes_between_two_powers_of_two():
    sizes = {len(few_sizes(torch.arange(1000) < count)[1]) for count in range(64, 128)}
    assert sizes == {64, 72, 80, 88, 96, 104, 112, 120, 128}


def test_what_the_head_is_given_besides_changes_no_score(family, make_lm, monkeypatch):
    lm = make_lm(family)
    rows = rows_for(lm) * 4
    monkeypatch.setattr("qpeft.lm.layout.EIGHTHS", 1)
    sizes = []
    lm.model.get_output_embeddings().register_forward_hook(lambda _, given, out: sizes.append(out.shape[:-1].numel()))
    values = lm.log_probs(rows)
    assert sum(sizes) > sum(sum(row.scored) for row in rows)
    assert_close(values, [naive_log_probs(lm.model, row) for row in rows])
