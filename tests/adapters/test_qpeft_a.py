"""Q-PEFT-A and Q-PEFT-C attend from the query to the passage; soft_prompt and passage_prompt are their controls."""

import pytest
import torch

from qpeft.adapter import Pairs
from qpeft.adapters import qpeft_a
from qpeft.adapters._attention import CosineAttention
from qpeft.errors import OptionError
from qpeft.types import Passage, Query
from tiny_adapters import PASSAGES, build, rows_for, with_store

WORDS = [
    "sky",
    "sea",
    "moon",
    "tide",
    "water",
    "cat",
    "dog",
    "river",
    "lake",
    "city",
    "king",
    "year",
    "lion",
    "red",
    "green",
]


@pytest.fixture(scope="module")
def lm(make_lm):
    return make_lm("llama")


def ids(lm, words):
    return lm.tokenizer(" ".join(words), add_special_tokens=False)["input_ids"]


def pairs(lm, query, passage, width=None):
    """Return one pair, the passage padded to a width."""
    asked, read = torch.tensor([ids(lm, query)]), ids(lm, passage)
    padding = (width or len(read)) - len(read)
    mask = torch.tensor([[True] * len(read) + [False] * padding])
    return Pairs(asked, torch.ones_like(asked).bool(), torch.tensor([[*read, *[0] * padding]]), mask)


@pytest.mark.parametrize("init", ["cosine", "default"])
def test_the_order_of_the_passage_has_no_influence(lm, init):
    adapter = build("qpeft_a", lm, attn_init=init, trained=True)
    given = pairs(lm, ["sky", "old"], WORDS)
    order = torch.randperm(len(WORDS), generator=torch.Generator().manual_seed(0))
    shuffled = Pairs(given.query, given.query_mask, given.passage[:, order], given.passage_mask)
    one, other = adapter(given), adapter(shuffled)
    torch.testing.assert_close(one.vectors, other.vectors, atol=1e-5, rtol=0)
    torch.testing.assert_close(one.attention[..., order], other.attention, atol=1e-5, rtol=0)


@pytest.mark.parametrize("init", ["cosine", "default"])
def test_masked_tokens_have_exactly_no_influence(lm, init):
    adapter = build("qpeft_a", lm, attn_init=init, trained=True)
    given = pairs(lm, ["sky", "old"], WORDS[:4], width=9)
    hints = adapter(given)
    assert hints.attention[..., 4:].abs().max() == 0
    for token in (5, 77, 300):
        other = given.passage.masked_fill(~given.passage_mask, token)
        assert torch.equal(
            adapter(Pairs(given.query, given.query_mask, other, given.passage_mask)).vectors, hints.vectors
        )
    torch.testing.assert_close(hints.vectors, adapter(pairs(lm, ["sky", "old"], WORDS[:4])).vectors)


@pytest.mark.parametrize("init", ["cosine", "default"])
def test_a_passage_without_tokens_reads_zeros(lm, init):
    adapter = build("qpeft_a", lm, attn_init=init, hint_prefix="", hint_suffix="", mlp_layers=0)
    empty = torch.zeros(1, 3, dtype=torch.long)
    query = torch.tensor([ids(lm, ["sky"])])
    for passage in (empty, empty[:, :0]):
        hints = adapter(Pairs(query, torch.ones_like(query).bool(), passage, torch.zeros_like(passage).bool()))
        assert not hints.vectors.any()
        assert not hints.attention.any()
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.1)
    passage, mask = torch.tensor([ids(lm, WORDS[:3]), [0] * 3]), torch.tensor([[True] * 3, [False] * 3])
    hints = adapter(Pairs(query.repeat(2, 1), torch.ones(2, 1).bool(), passage, mask))
    hints.vectors.square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in adapter.parameters() if p.grad is not None)


def test_one_vector_for_each_query_token_and_marker(lm):
    adapter = build("qpeft_a", lm, hint_prefix="hints : the", hint_suffix="red")
    given = pairs(lm, ["sky", "old", "lion"], WORDS)
    hints = adapter(given)
    assert hints.vectors.shape == (1, 3 + 3 + 1, 32)
    assert hints.mask.all()
    assert adapter.hint_length(3) == 7
    # Untrained, the markers are the plain vectors of their words.
    table = lm.embeddings.weight
    expected = table[ids(lm, ["hints", ":", "the"])]
    torch.testing.assert_close(hints.vectors[0, :3], expected)
    torch.testing.assert_close(hints.vectors[0, -1:], table[ids(lm, ["red"])])


def test_an_untrained_cosine_attention_looks_for_the_same_word(lm):
    adapter = build("qpeft_a", lm, attn_dim=32)
    for word in WORDS:
        (weights,) = adapter(pairs(lm, [word], WORDS)).attention
        assert int(weights.argmax()) == WORDS.index(word)
        assert weights.max() > 0.5
    without = adapter(pairs(lm, ["sky"], WORDS[1:])).attention
    assert without.max() < 0.9


def test_what_an_untrained_cosine_attention_reads_is_inside_the_embedding_space(lm):
    adapter = build("qpeft_a", lm, hint_prefix="", hint_suffix="")
    hints = adapter(pairs(lm, ["sky"], WORDS))
    mixed = hints.attention[0] @ lm.embeddings.weight[ids(lm, WORDS)]
    torch.testing.assert_close(hints.vectors[0], mixed, atol=1e-5, rtol=0)


def test_a_logit_starts_near_a_centred_cosine(lm):
    table = lm.embeddings.weight.float()
    attention = CosineAttention(table, heads=1, dim=32, sharpness=1.0, dropout=0.0, scale=1.0)
    centred = attention._centred(table[None])[0]
    logits = (centred @ attention.query.T) @ (centred @ attention.key.T).T
    assert logits.diagonal().mean().item() == pytest.approx(1.0, abs=1e-3)
    others = logits[~torch.eye(len(table)).bool()]
    assert abs(others.mean().item()) < 0.05


def test_default_attention_starts_near_uniform(lm):
    adapter = build("qpeft_a", lm, attn_init="default", hint_prefix="", hint_suffix="")
    # So it is where embeddings are as small as those of real models.
    small = Pairs(*(getattr(pairs(lm, WORDS[:3], WORDS), name) for name in Pairs.__slots__))
    frozen = adapter.look_up_frozen(small.passage) * 0.02
    allowed = small.passage_mask
    out, weights = adapter.attention(frozen[:, :3], frozen, allowed)
    entropy = -(weights * weights.log()).sum(2) / torch.log(torch.tensor(float(len(WORDS))))
    assert entropy.min() > 0.999
    cosine = torch.nn.functional.cosine_similarity(out[0, 0], out[0, 1], dim=0)
    assert cosine > 0.999


@pytest.mark.parametrize("init", ["cosine", "default"])
@pytest.mark.parametrize(
    ("letters", "left"),
    [
        ("", ["the", "sky", "is", ".", "blue"]),
        ("q", ["the", "is", "."]),
        ("s", ["sky", ".", "blue"]),
        ("a", ["the", "sky", "is", "blue"]),
        ("qs", ["."]),
        ("qsa", ["the", "sky", "is", ".", "blue"]),
    ],
)
def test_weights_sum_to_one_over_what_the_filter_leaves(lm, init, letters, left):
    adapter = build("qpeft_a", lm, attn_init=init, token_filter=letters, trained=True)
    passage = ["the", "sky", "is", ".", "blue"]
    (weights,) = adapter(pairs(lm, ["blue", "sky"], passage, width=8)).attention
    torch.testing.assert_close(weights.sum(1), torch.ones(2))
    kept = torch.tensor([word in left for word in passage] + [False] * 3)
    assert (weights[:, ~kept] == 0).all()
    assert (weights[:, kept] > 0).all()


def test_dropout_is_for_training_alone(lm):
    adapter = build("qpeft_a", lm, attn_dropout=0.5)
    given = pairs(lm, ["sky", "old"], WORDS)
    assert torch.equal(adapter(given).vectors, adapter(given).vectors)
    adapter.train()
    assert not torch.equal(adapter(given).vectors, adapter(given).vectors)


def test_the_preset_authors_builds_and_trains(lm):
    adapter = build("qpeft_a", lm, authors=True).train()
    assert adapter.config == qpeft_a.Authors()
    assert adapter.reads_template
    width, size = 32, lm.embeddings.weight.shape[0]
    attention = 4 * width * width + 4 * width
    assert adapter.count_parameters() == size * width + attention + 2 * (width * width + width)
    rows = rows_for(lm, adapter, "qpeft")
    (-lm.score(rows, [adapter] * len(rows))[0].mean()).backward()
    assert all(p.grad is not None and p.grad.any() for p in adapter.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attn_dim": 15}, "--attn-dim 15 must be a multiple of --num-heads 2"),
        ({"attn_dim": 64}, "--attn-dim 64 must be .* at most 32"),
        ({"num_heads": 0}, "--num-heads 0"),
        ({"num_heads": 5, "attn_init": "default"}, "--num-heads is 5; it must divide the hidden size 32"),
    ],
)
def test_options_out_of_range(lm, options, message):
    with pytest.raises(OptionError, match=message):
        build("qpeft_a", lm, **options)


@pytest.mark.parametrize("layer", [-1, 0, 1])
def test_an_untrained_c_is_an_untrained_a(lm, layer):
    # The value projection is drawn before the parts that only C has.
    a, c = build("qpeft_a", lm), build("qpeft_c", lm, layer=layer)
    assert c.reads_layer == (2 if layer == -1 else layer)
    rows = rows_for(lm, a)
    for one, other in zip(lm.log_probs(rows, adapters=a), lm.log_probs(rows, adapters=c), strict=True):
        torch.testing.assert_close(one.target, other.target, atol=1e-4, rtol=0)


def test_c_reads_the_states_of_the_passage(lm):
    c = build("qpeft_c", lm, trained=True)
    (row,) = rows_for(lm, c, queries=[Query("q", "sky")], passages=PASSAGES[1:2])
    states = lm.encode(row.context[: row.hint], c.reads_layer).states
    read = lm.pairs([row], c, [states])
    with torch.no_grad():
        out = lm.model(input_ids=torch.tensor([row.context]), output_hidden_states=True)
    torch.testing.assert_close(read.states, out.hidden_states[-1][:, slice(*row.passage)], atol=1e-4, rtol=0)
    moved = Pairs(read.query, read.query_mask, read.passage, read.passage_mask, read.states.flip(1))
    assert not torch.allclose(c(read).vectors, c(moved).vectors, atol=1e-3)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_encoding_returns_the_states_of_the_layer_asked_for(lm, layer):
    (row, *_) = rows_for(lm, build("qpeft_c", lm))
    with torch.no_grad():
        out = lm.model(input_ids=torch.tensor([row.context]), output_hidden_states=True)
    torch.testing.assert_close(lm.encode(row.context, layer).states, out.hidden_states[layer][0], atol=1e-4, rtol=0)


def test_the_same_context_is_kept_for_each_layer(lm):
    stored = with_store(lm)
    made = [build("qpeft_c", lm, trained=True, layer=layer) for layer in (0, 1)]
    rows = rows_for(lm, made[0])
    for _ in range(2):
        for adapter in made:
            for one, other in zip(
                stored.log_probs(rows, adapters=adapter), lm.log_probs(rows, adapters=adapter), strict=True
            ):
                torch.testing.assert_close(one.target, other.target, atol=1e-4, rtol=0)


def test_options_of_c(lm):
    with pytest.raises(OptionError, match="--layer is 3; the model has 2 layers"):
        build("qpeft_c", lm, layer=3)
    with pytest.raises(OptionError, match="--layer is -4"):
        build("qpeft_c", lm, layer=-4)
    with pytest.raises(OptionError, match="--attn-init of qpeft_c is cosine"):
        build("qpeft_c", lm, attn_init="default")
    made = [build("qpeft_c", lm, layer=layer) for layer in (0, 1)]
    rows = rows_for(lm, made[0])[:2]
    with pytest.raises(OptionError, match="read states of different layers"):
        lm.score(rows, made)
    alone = [lm.log_probs([row], adapters=adapter)[0].target for row, adapter in zip(rows, made, strict=True)]
    for one, other in zip(lm.log_probs(rows, adapters=made), alone, strict=True):
        torch.testing.assert_close(one.target, other, atol=1e-4, rtol=0)


@pytest.mark.parametrize("length", [2, 5, 9])
def test_a_soft_prompt_starts_as_its_text_repeated_or_cut(lm, length):
    adapter = build("soft_prompt", lm, length=length, init_text="the red sky")
    expected = lm.embeddings.weight[(ids(lm, ["the", "red", "sky"]) * 3)[:length]]
    for passage in (WORDS, WORDS[:2]):
        hints = adapter(pairs(lm, ["moon"], passage))
        torch.testing.assert_close(hints.vectors[0], expected)
        assert hints.mask.all()


def test_other_starts_of_a_soft_prompt(lm):
    drawn = [build("soft_prompt", lm, init="vocabulary", init_seed=seed) for seed in (0, 0, 1)]
    read = [adapter(pairs(lm, ["moon"], WORDS)).vectors[0] for adapter in drawn]
    assert torch.equal(read[0], read[1])
    assert not torch.equal(read[0], read[2])
    distances = torch.cdist(read[0], lm.embeddings.weight.float())
    assert distances.min(1).values.max() < 1e-3
    noise = build("soft_prompt", lm, init="random", length=200)(pairs(lm, ["moon"], WORDS)).vectors
    size = lm.embeddings.weight.square().mean().sqrt()
    assert noise.square().mean().sqrt().item() == pytest.approx(size.item(), rel=0.05)


@pytest.mark.parametrize(
    ("options", "message"), [({"length": 0}, "--length is 0"), ({"init_text": " "}, "--init-text ' ' has no tokens")]
)
def test_options_of_the_soft_prompt(lm, options, message):
    with pytest.raises(OptionError, match=message):
        build("soft_prompt", lm, **options)


@pytest.mark.parametrize("name", ["qpeft_a", "qpeft_c", "qpeft_r"])
def test_vectors_of_a_soft_prompt_stand_before_the_hint(lm, name):
    alone, soft = build(name, lm), build("soft_prompt", lm, length=4)
    both = build(name, lm, soft_length=4)
    (row,) = rows_for(lm, alone, queries=[Query("q", "sky")], passages=PASSAGES[1:2])
    states = None if both.reads_layer is None else [lm.encode(row.context[: row.hint], both.reads_layer).states]
    given = lm.pairs([row], both, states)
    made, expected, before = both(given), alone(given), soft(given)
    assert torch.equal(made.vectors, torch.cat([before.vectors, expected.vectors], 1))
    assert torch.equal(made.mask, torch.cat([before.mask, expected.mask], 1))
    for own, other in ((made.chosen, expected.chosen), (made.attention, expected.attention)):
        assert own is other is None or torch.equal(own, other)
    assert both.hint_length(3) == alone.hint_length(3) + 4
    assert both.count_parameters() == alone.count_parameters() + soft.count_parameters()
    with pytest.raises(OptionError, match="--soft-length is -1; it must be at least 0"):
        build(name, lm, soft_length=-1)


@pytest.mark.parametrize("form", ["attend", "all"])
def test_a_passage_prompt_does_not_know_the_query(lm, form):
    adapter = build("passage_prompt", lm, form=form, trained=True)
    given = [adapter(pairs(lm, query, WORDS)).vectors for query in (["moon"], ["sky", "sea", "why"])]
    assert torch.equal(*given)
    assert not torch.equal(given[0], adapter(pairs(lm, ["moon"], WORDS[1:])).vectors)


def test_the_form_all_passes_every_passage_token(lm):
    adapter = build("passage_prompt", lm, form="all", instruction="red")
    table = lm.embeddings.weight
    for words in (WORDS[:3], WORDS, WORDS * 3):
        hints = adapter(pairs(lm, ["moon"], words, width=50))
        torch.testing.assert_close(hints.vectors[hints.mask], table[ids(lm, ["red", *words])])
    assert adapter.hint_length(99) == lm.max_length // 2 + 1


def test_the_form_all_leaves_room_for_a_vector_of_every_token(lm):
    adapter = build("passage_prompt", lm, form="all", instruction="")
    (row,) = rows_for(lm, adapter, queries=[Query("q", "moon")], passages=[Passage("p", "the sea " * 200)])
    assert row.truncated
    start, end = row.passage
    hints = adapter(lm.pairs([row], adapter, None))
    assert hints.mask.sum() == end - start > 40
    assert torch.isfinite(lm.log_probs([row], adapters=adapter)[0].target).all()


def test_the_form_all_may_be_bounded(lm):
    adapter = build("passage_prompt", lm, form="all", most=6, instruction="red")
    for count in (3, 6, 9):
        hints = adapter(pairs(lm, ["moon"], WORDS[:count], width=10))
        expected = lm.embeddings.weight[ids(lm, ["red", *WORDS[: min(count, 6)]])]
        torch.testing.assert_close(hints.vectors[hints.mask], expected)
    assert adapter.hint_length(99) == 7
    with pytest.raises(OptionError, match="--most is 0; it must be at least 1"):
        build("passage_prompt", lm, form="all", most=0)


def test_the_form_attend_gives_k_vectors_of_the_passage(lm):
    adapter = build("passage_prompt", lm, k=3, instruction="")
    hints = adapter(pairs(lm, ["moon"], WORDS, width=20))
    assert hints.vectors.shape == (1, 3, 32)
    torch.testing.assert_close(hints.attention.sum(2), torch.ones(1, 3))
    mixed = hints.attention[0, :, : len(WORDS)] @ lm.embeddings.weight[ids(lm, WORDS)]
    torch.testing.assert_close(hints.vectors[0], mixed, atol=1e-5, rtol=0)
    with pytest.raises(OptionError, match="--k is 0"):
        build("passage_prompt", lm, k=0)


def test_a_long_passage_is_read_to_its_end(lm):
    adapter = build("qpeft_a", lm, attn_dim=32)
    words = [*WORDS * 3, "octopus"]
    rows = rows_for(lm, adapter, queries=[Query("q", "octopus")], passages=[Passage("p", " ".join(words))])
    (weights,) = adapter(lm.pairs(rows, adapter, None)).attention[0]
    assert int(weights.argmax()) == len(words) - 1


def test_heads_start_with_like_shares_of_the_principal_axes(lm):
    table, heads, dim = lm.embeddings.weight.float(), 4, 16
    attention = CosineAttention(table, heads=heads, dim=dim, sharpness=1.0, dropout=0.0, scale=1.0)
    unit = torch.nn.functional.normalize(table, dim=1)
    centred = unit - unit.mean(0)
    axes = torch.linalg.eigh(centred.T @ centred).eigenvectors.T.flip(0)[:dim]
    for head in range(heads):
        own = attention.query[head * dim // heads : (head + 1) * dim // heads]
        cosines = torch.nn.functional.normalize(own, dim=1) @ axes[head::heads].T
        torch.testing.assert_close(cosines.abs(), torch.eye(dim // heads), atol=1e-3, rtol=0)
        assert (centred @ own.T).square().sum(1).mean().item() == pytest.approx(1.0, abs=1e-4)
        assert (own.gather(1, own.abs().argmax(1, keepdim=True)) > 0).all(), "whichever sign eigenvectors come with"
