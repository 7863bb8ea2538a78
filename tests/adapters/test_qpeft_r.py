"""Q-PEFT-R chooses the tokens that it says it chooses, and an untrained hint is their plain text."""

import math
import random

import pytest
import torch

from qpeft.adapter import Pairs
from qpeft.adapters import qpeft_r
from qpeft.adapters._token_filter import TokenFilter, first_occurrences
from qpeft.errors import OptionError
from qpeft.template import Prompt, Template, load_template
from qpeft.types import Passage, Query
from reference import naive_log_probs
from tiny_adapters import BEFORE, QUERIES, build, rows_for

DEGREES = {"sky": 0, "sea": 10, "cat": 20, "moon": 30, "lion": 60, "the": 5, "was": 15, ".": 2, "king": 90}


@pytest.fixture
def lm(make_lm):
    return make_lm("llama")


@pytest.fixture
def compass(make_lm):
    """A model whose words stand in known directions; all others are orthogonal to them."""
    lm = make_lm("llama")
    with torch.no_grad():
        table = lm.embeddings.weight
        table.zero_()
        table[:, 2] = 1.0
        for length, (word, degrees) in enumerate(DEGREES.items(), start=1):
            angle = math.radians(degrees)
            table[ids(lm, word)[0]] = length * torch.tensor([math.cos(angle), math.sin(angle), *[0.0] * 30])
    return lm


def ids(lm, text):
    return lm.tokenizer(text, add_special_tokens=False)["input_ids"]


def pairs(lm, query, *passages):
    """Return a query with passages, padded with zeros."""
    each = [ids(lm, passage) for passage in passages]
    width = max(map(len, each))
    passage = torch.tensor([[*some, *[0] * (width - len(some))] for some in each])
    mask = torch.tensor([[place < len(some) for place in range(width)] for some in each])
    asked = torch.tensor([ids(lm, query)] * len(each))
    return Pairs(asked, torch.ones_like(asked).bool(), passage, mask)


def chosen_words(lm, adapter, query, passage):
    given = pairs(lm, query, passage)
    (places,) = adapter.choose(given)
    return [lm.tokenizer.convert_ids_to_tokens(int(given.passage[0, place])) for place in places if place >= 0]


def test_the_most_similar_tokens_in_order(compass):
    adapter = build("qpeft_r", compass, k=3, token_filter="d")
    assert chosen_words(compass, adapter, "sky", "lion moon sea king cat") == ["sea", "cat", "moon"]
    assert chosen_words(compass, adapter, "king", "sea cat lion moon") == ["lion", "moon", "cat"]


def test_a_token_counts_by_its_best_query_token(compass):
    adapter = build("qpeft_r", compass, k=4, token_filter="d")
    assert chosen_words(compass, adapter, "sky king", "moon sea lion cat king") == ["king", "sea", "cat", "moon"]


def test_dot_products_prefer_long_vectors(compass):
    adapter = build("qpeft_r", compass, k=2, token_filter="d", similarity="dot")
    assert chosen_words(compass, adapter, "sky", "sea cat moon") == ["moon", "cat"]


@pytest.mark.parametrize(
    ("letters", "expected"),
    [
        ("d", ["sky", ".", "the", "sea"]),
        ("dq", [".", "the", "sea", "was"]),
        ("ds", ["sky", ".", "sea", "moon"]),
        ("da", ["sky", "the", "sea", "was"]),
        ("dqsa", ["sea", "moon", "lion"]),
        ("", ["sky", "sky", ".", "the"]),
        ("q", [".", "the", "the", "sea"]),
    ],
)
def test_filters(compass, letters, expected):
    adapter = build("qpeft_r", compass, k=4, token_filter=letters)
    assert chosen_words(compass, adapter, "sky", "the sky was the sea . sky moon lion") == expected


def test_where_nothing_is_left_nothing_is_filtered(compass):
    adapter = build("qpeft_r", compass, k=2, token_filter="dqsa")
    assert chosen_words(compass, adapter, "sky", "the was the .") == [".", "the"]
    assert chosen_words(compass, adapter, "sky", "sky sky") == ["sky"]


def test_fewer_than_k(compass):
    adapter = build("qpeft_r", compass, k=5, token_filter="d")
    given = pairs(compass, "sky", "sea sea cat", "moon lion sea cat the was .")
    hints = adapter(given)
    markers = len(ids(compass, "hints:")) + len(ids(compass, "\n"))
    assert hints.mask.sum(1).tolist() == [2 + markers, 5 + markers]
    assert hints.chosen.tolist() == [[0, 2, -1, -1, -1], [6, 4, 2, 5, 3]]
    assert adapter.hint_length(1) == 5 + markers


def test_the_earliest_wins_a_tie(compass):
    adapter = build("qpeft_r", compass, k=3, token_filter="d")
    assert chosen_words(compass, adapter, "sky king moon", "moon lion king sky") == ["moon", "king", "sky"]
    assert chosen_words(compass, adapter, "sky king moon", "sky lion moon king") == ["sky", "moon", "king"]


def test_words_of_the_query_come_in_the_order_of_the_passage(lm):
    # Each has a cosine of 1 with itself, but for the last bits.
    words = ["sky", "sea", "moon", "tide", "water", "cat", "dog", "river", "lake", "city", "king", "year"]
    adapter = build("qpeft_r", lm, k=len(words), token_filter="d")
    for seed in range(5):
        shuffled = random.Random(seed).sample(words, len(words))
        assert chosen_words(lm, adapter, " ".join(words), " ".join([*shuffled, "old", "red"])) == shuffled


def test_words_of_the_template_are_chosen_only_if_asked_for(lm):
    query = Query("q", "passage : hints input")
    for template in ("plain", "qpeft", BEFORE):
        for allowed in (False, True):
            adapter = build("qpeft_r", lm, k=3, token_filter="d", template_tokens=allowed)
            (row,) = rows_for(lm, adapter, template, queries=[query], passages=[Passage("p", "the old lion")])
            read = lm.pairs([row], adapter, None)
            words = lm.tokenizer.convert_ids_to_tokens(read.passage[0].tolist())
            assert {"the", "old", "lion"} <= set(words)
            assert ("passage" in words) == allowed
            assert "[CLS]" not in words
            (places,) = adapter.choose(read)
            assert ("passage" in {words[place] for place in places}) == allowed


def test_an_untrained_hint_is_the_plain_text_of_its_tokens(family, make_lm):
    lm = make_lm(family)
    adapter = build("qpeft_r", lm, k=3)
    for row in rows_for(lm, adapter, "qpeft"):
        (places,) = adapter.choose(lm.pairs([row], adapter, None))
        span = row.context[slice(*row.passage)]
        text = [*ids(lm, "hints:"), *(span[place] for place in places if place >= 0), *ids(lm, "\n")]
        said = type(row)(
            (*row.context[: row.hint], *text, *row.context[row.hint :]), row.target, row.scored, (0, 0), None
        )
        expected = torch.tensor(naive_log_probs(lm.model, said)[0], dtype=torch.float64)
        (value,) = lm.log_probs([row], adapters=adapter)
        torch.testing.assert_close(value.target.double(), expected, atol=1e-4, rtol=0)


def test_so_it_equals_a_hard_prompt(lm):
    adapter = build("qpeft_r", lm, k=2, token_filter="ds")
    passage = Passage("p", "the red sky is blue")
    (row,) = rows_for(lm, adapter, queries=QUERIES[:1], passages=[passage])
    hard = Template("hard", 1, "Passage: {passage}\nhints: sky blue\n", "Question: {query}")
    (written,) = Prompt(hard, lm.tokenizer, 128).rows(QUERIES[0], passage)
    hinted, plain = lm.log_probs([row], adapters=adapter)[0].target, lm.log_probs([written])[0].target
    torch.testing.assert_close(hinted, plain, atol=1e-4, rtol=0)


def test_random_tokens_are_a_fixed_function_of_query_and_passage(lm):
    similar = build("qpeft_r", lm, k=3, token_filter="d")
    adapter, again = (build("qpeft_r", lm, k=3, token_filter="d", select="random", seed=seed) for seed in (1, 2))
    text = "sky sea moon tide water cat dog river lake city king year people lion"
    asked = ["sky", "sea king", "why is the lion old", "moon water dog"]
    found = [chosen_words(lm, adapter, query, text) for query in asked]
    assert found == [chosen_words(lm, again, query, text) for query in asked]
    assert all(set(words) <= set(text.split()) and len(set(words)) == 3 for words in found)
    assert found != [chosen_words(lm, similar, query, text) for query in asked]
    assert len(set(map(tuple, found))) > 1, "other queries get other tokens"
    alone = [adapter.choose(pairs(lm, "sky", some))[0, :2].tolist() for some in (text, "sea dog")]
    both = adapter.choose(pairs(lm, "sky", text, "sea dog"))[:, :2].tolist()
    assert both == alone


def test_random_tokens_are_spread_over_the_passage(lm):
    adapter = build("qpeft_r", lm, k=1, token_filter="d", select="random")
    text = "sky sea moon tide water cat dog river lake city"
    first = [chosen_words(lm, adapter, f"{a} {b}", text)[0] for a in text.split() for b in ("why", "who", "old", "new")]
    assert len(set(first)) >= 6


def test_the_random_choice_of_finished_adapters_stays(lm):
    adapter = build("qpeft_r", lm, k=4, token_filter="d", select="random")
    text = "sky sea moon tide water cat dog river lake city"
    assert chosen_words(lm, adapter, "why", text) == ["moon", "dog", "sea", "tide"]
    assert chosen_words(lm, adapter, "sky king", text) == ["cat", "city", "moon", "dog"]


def test_each_seed_has_random_tokens_of_its_own(lm):
    text = "sky sea moon tide water cat dog river lake city king year people lion"
    made = [build("qpeft_r", lm, k=14, token_filter="d", select="random", select_seed=seed) for seed in (0, 2, 3)]
    orders = [chosen_words(lm, adapter, "why", text) for adapter in made]
    assert all(sorted(order) == sorted(text.split()) for order in orders)
    assert len(set(map(tuple, orders))) == 3
    assert orders[1:] == [chosen_words(lm, adapter, "why", text) for adapter in made[1:]]


def neighbours(order):
    return set(zip(order, [*order[1:], order[0]], strict=True))


def test_with_a_seed_the_query_does_more_than_turn_one_order(lm):
    text = "sky sea moon tide water cat dog river lake city king year people lion"
    asked = ["why", "sky king", "old lion", "who made the city"]
    kept = {}
    for seed in (0, 2):
        adapter = build("qpeft_r", lm, k=14, token_filter="d", select="random", select_seed=seed)
        rings = [neighbours(chosen_words(lm, adapter, query, text)) for query in asked]
        kept[seed] = sum(len(ring & rings[0]) for ring in rings[1:]) / (3 * 14)
    assert kept[0] > 0.9
    assert kept[2] < 0.35


def test_the_preset_authors_builds_and_trains(lm):
    adapter = build("qpeft_r", lm, authors=True).train()
    assert adapter.config == qpeft_r.Authors()
    assert adapter.reads_template
    width, size = lm.embeddings.weight.shape[1], lm.embeddings.weight.shape[0]
    assert adapter.count_parameters() == size * width + 2 * (width * width + width)
    rows = rows_for(lm, adapter, "qpeft")
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-3)
    before = {name: parameter.clone() for name, parameter in adapter.named_parameters()}
    (-lm.score(rows, [adapter] * len(rows))[0].mean()).backward()
    optimizer.step()
    assert all(not torch.equal(before[name], parameter) for name, parameter in adapter.named_parameters())


def test_selection_drifts_with_a_trainable_similarity_table(compass):
    options = {"k": 1, "token_filter": "d", "token_table": "trainable"}
    drifting = build("qpeft_r", compass, similarity_table="trainable", **options)
    fixed = build("qpeft_r", compass, similarity_table="frozen", **options)
    sky, king = ids(compass, "sky")[0], ids(compass, "king")[0]
    for adapter in (drifting, fixed):
        assert chosen_words(compass, adapter, "sky", "sea lion") == ["sea"]
        with torch.no_grad():
            adapter.token_table[sky] = adapter.token_table[king]
    assert chosen_words(compass, drifting, "sky", "sea lion") == ["lion"]
    assert chosen_words(compass, fixed, "sky", "sea lion") == ["sea"]


def test_hints_are_looked_up_in_the_trainable_table(compass):
    adapter = build("qpeft_r", compass, k=1, token_table="trainable", hint_prefix="", hint_suffix="")
    with torch.no_grad():
        adapter.token_table[ids(compass, "sea")[0]] = 7.0
    assert adapter(pairs(compass, "sky", "lion sea")).vectors.flatten().tolist() == [7.0] * 32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "--k is 0; it must be at least 1"),
        ({"token_filter": "dx"}, "unknown letter 'x'; known: d, q, s, a"),
        ({"similarity_table": "trainable"}, "--similarity-table trainable needs --token-table trainable"),
        ({"mlp_layers": 2}, "--mlp-layers is 2"),
        ({"mlp_layers": -1, "mlp_init": "default"}, "--mlp-layers is -1"),
        ({"mlp_hidden": 0}, "--mlp-hidden is 0; it must be at least 1"),
    ],
)
def test_options_out_of_range(lm, options, message):
    with pytest.raises(OptionError, match=message):
        build("qpeft_r", lm, **options)


def test_markers_may_be_empty(lm):
    adapter = build("qpeft_r", lm, k=2, hint_prefix="", hint_suffix="")
    assert adapter.hint_length(9) == 2
    prompt = Prompt(load_template("plain"), lm.tokenizer, 128, hint_length=adapter.hint_length)
    (row,) = prompt.rows(QUERIES[0], Passage("p", "the moon"))
    assert torch.isfinite(lm.log_probs([row], adapters=adapter)[0].target).all()


@pytest.mark.parametrize(
    ("letters", "barred", "kept"),
    [
        ("s", ["the", "▁the", "Ġthe", "The", "▁www"], ["##the", "▁sky", "theme", "<0x0A>"]),
        ("a", ["▁", ".", "Ġ3", "水", "<0x0A>", "<0x2E>"], ["▁a", "Ġb2", "##c", "<0x41>"]),
    ],
)
def test_pieces_of_every_kind_of_vocabulary(letters, barred, kept):
    class Vocabulary:
        all_special_ids = (0, 900)

        def get_vocab(self):
            return {piece: place for place, piece in enumerate(["[PAD]", *barred, *kept])}

    size = 1 + len(barred) + len(kept)
    made = TokenFilter(letters, Vocabulary(), size, torch.device("cpu"))
    assert made.barred.tolist() == [True] + [True] * len(barred) + [False] * len(kept)


def test_first_occurrences():
    found = first_occurrences(
        torch.tensor([[5, 6, 5, 6, 7], [5, 5, 5, 6, 0]]),
        torch.tensor([[True] * 5, [False, True, True, True, False]]),
    )
    assert found.int().tolist() == [[1, 1, 0, 0, 1], [0, 1, 0, 1, 0]]
