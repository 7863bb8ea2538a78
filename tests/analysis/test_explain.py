import html.parser
import re

import pytest
import torch

from qpeft.adapters._folder import load_adapter, save_adapter
from qpeft.analysis.explain import Explanation, PassageToken, QueryToken, explain, most_read
from qpeft.analysis.explanation_page import explanation_page
from qpeft.analysis.pieces import pieces, words
from qpeft.errors import InputError, OptionError, ScoreError
from qpeft.methods import open_scorer
from qpeft.methods.query_likelihood import Config, build_scorer
from qpeft.methods.query_likelihood import build as build_method
from qpeft.template import Prompt, Template, load_template
from qpeft.types import Candidates, Passage, Query
from tiny_adapters import BEFORE, build

QUERY = Query("q", "Why is the SKY blue?")
PASSAGES = [
    Passage("a", "The sea is salty, the tide of the sea.", "Sea"),
    Passage("b", "The light of the sky is blue."),
    Passage("c", "An octopus has three hearts, and the red moon is in the old city."),
    Passage("d", "lake"),
]
PROMPTS = ["passage_prompt", "qpeft_a", "qpeft_c", "qpeft_r", "soft_prompt"]


@pytest.fixture(scope="module")
def lm(make_lm):
    return make_lm("llama")


def _template(named):
    return named if isinstance(named, Template) else load_template(named)


@pytest.fixture
def saved(lm, tmp_path):
    """Return a function that saves an adapter whose parameters all matter, and returns its folder."""

    def save(name, template="plain", lm=lm, max_passage_tokens=None, **options):
        adapter = build(name, lm, trained=True, **options)
        folder = tmp_path / name
        save_adapter(folder, name, adapter, lm, _template(template), max_passage_tokens=max_passage_tokens)
        return folder

    return save


def check_against_scoring(lm, adapter, template, found, max_passage_tokens=None):
    """Tokens must add up to what query likelihood gives, and ranks must be those of its ranking."""
    options = Config(template=template, max_passage_tokens=max_passage_tokens)
    if adapter is not None:
        options = Config(adapter=str(adapter))
    reranker = build_method(options, lm)
    (ranking,) = reranker.rerank([Candidates(QUERY, tuple(PASSAGES))])
    expected = {hit.passage_id: (rank, hit.score) for rank, hit in enumerate(ranking.hits, start=1)}
    for each in found:
        rank, score = expected[each.passage.id]
        of_tokens = [token.log_prob if adapter is None else token.hinted for token in each.query]
        assert sum(of_tokens) / len(of_tokens) == pytest.approx(score, abs=1e-4)
        assert (each.score if adapter is None else each.hinted_score) == pytest.approx(score, abs=1e-4)
        assert each.place == rank


@pytest.mark.parametrize("template", ["plain", "qpeft", "upr"])
def test_without_an_adapter_the_tokens_add_up_to_the_score(lm, template):
    found = explain(build_scorer(Config(template=template), lm), QUERY, PASSAGES)
    check_against_scoring(lm, None, template, found)
    for each, passage in zip(found, PASSAGES, strict=True):
        assert each.passage == passage
        own = "".join(token.text for token in each.query if not token.of_template)
        assert own == QUERY.text if template != "qpeft" else own.lower() == QUERY.text.lower()
        assert any(token.of_template for token in each.query) == (template == "upr")
        assert "".join(token.text for token in each.tokens) == f"{passage.title} {passage.text}".strip()
        assert {each.hinted_score, each.hinted_rank, each.attention} == {None}
        assert each.moved == 0


@pytest.mark.parametrize("name", PROMPTS)
def test_with_an_adapter_the_tokens_add_up_to_the_score(lm, saved, name):
    folder = saved(name)
    found = explain(open_scorer(lm, folder), QUERY, PASSAGES, attention=True)
    check_against_scoring(lm, folder, "plain", found)
    alone = explain(build_scorer(Config(), lm), QUERY, PASSAGES)
    for each, before in zip(found, alone, strict=True):
        assert each.score == pytest.approx(before.score, abs=1e-4)
        assert each.rank == before.rank
        assert each.moved == each.rank - each.hinted_rank
        assert any(abs(token.change) > 1e-3 for token in each.query)
    assert {each.hinted_rank for each in found} == {1, 2, 3, 4}


def test_a_hint_may_stand_before_the_passage(lm, saved):
    for name, options in (("qpeft_r", {"template_tokens": False}), ("qpeft_a", {"template_tokens": True})):
        folder = saved(name, BEFORE, **options)
        found = explain(open_scorer(lm, folder), QUERY, PASSAGES)
        check_against_scoring(lm, folder, None, found)
        texts = ["".join(token.text for token in each.tokens) for each in found]
        assert texts[1] == f"{'' if name == 'qpeft_r' else 'given the passage: '}The light of the sky is blue."


def test_lora_is_explained_by_its_scores(make_lm, saved):
    pytest.importorskip("peft")
    lm = make_lm("llama")
    folder = saved("lora", lm=lm)
    found = explain(open_scorer(lm, folder), QUERY, PASSAGES)
    check_against_scoring(lm, folder, "plain", found)
    assert any(abs(token.change) > 1e-3 for each in found for token in each.query)
    assert not any(each.hint or most_read(each) for each in found)


def test_an_opened_adapter_is_as_good_as_its_folder_and_batches_do_not_matter(make_lm, saved):
    one, other = make_lm("llama"), make_lm("llama", batch_tokens=40, padding_side="right")
    folder = saved("qpeft_r", lm=one)
    found = explain(open_scorer(one, folder), QUERY, PASSAGES)
    for each, again in zip(
        found, explain(open_scorer(other, load_adapter(folder, other)), QUERY, PASSAGES), strict=True
    ):
        assert again.tokens == each.tokens
        assert again.hinted_score == pytest.approx(each.hinted_score, abs=1e-4)


@pytest.mark.parametrize("template_tokens", [False, True])
def test_chosen_tokens_are_those_of_the_hint(lm, saved, template_tokens):
    folder = saved("qpeft_r", template_tokens=template_tokens, token_filter="d", k=6)
    adapter = load_adapter(folder, lm).adapter
    prompt = Prompt(load_template("plain"), lm.tokenizer, lm.max_length, hint_length=adapter.hint_length)
    for each in explain(open_scorer(lm, folder), QUERY, PASSAGES):
        pairs = lm.pairs(prompt.rows(QUERY, each.passage), adapter, None)
        places = [place for place in adapter.choose(pairs)[0].tolist() if place >= 0]
        chosen = {token.chosen: place for place, token in enumerate(each.tokens) if token.chosen}
        assert chosen == dict(enumerate(places, start=1))
        assert each.hint == tuple(words([token.text for token in each.tokens])[place] for place in places)
        ids = pairs.passage[0].tolist()
        assert len(each.tokens) == len(ids)
        # Pieces are compared with what the ids decode to, which knows no case.
        decoded = lm.tokenizer.decode(ids).replace(" ", "")
        assert "".join(token.text for token in each.tokens).replace(" ", "").strip().lower() == decoded
        assert any(token.of_template for token in each.tokens) == template_tokens
    assert explain(open_scorer(lm, folder), QUERY, PASSAGES)[1].hint[0] in ("sky", "is", "the", "The", "blue")


@pytest.mark.parametrize("name", ["qpeft_a", "qpeft_c", "passage_prompt"])
def test_attention_is_what_the_adapter_gave(lm, saved, name):
    folder = saved(name)
    for each in explain(open_scorer(lm, folder), QUERY, PASSAGES, attention=True):
        shares = torch.tensor([token.attention for token in each.tokens])
        assert shares.sum() == pytest.approx(1, abs=1e-5)
        assert not each.hint
        assert sum(share for _, share in most_read(each, 1000)) == pytest.approx(1, abs=0.05)
        if name == "passage_prompt":
            assert each.attention is None  # its own vectors attend
            continue
        full = torch.tensor(each.attention)
        assert full.shape == (len(each.query), len(each.tokens))
        assert torch.allclose(full.mean(0), shares, atol=1e-6)
    assert explain(open_scorer(lm, folder), QUERY, PASSAGES)[0].attention is None


def test_attention_of_static_embeddings_is_that_of_the_adapter_alone(lm, saved):
    folder = saved("qpeft_a")
    adapter = load_adapter(folder, lm).adapter
    prompt = Prompt(load_template("plain"), lm.tokenizer, lm.max_length, hint_length=adapter.hint_length)
    for each in explain(open_scorer(lm, folder), QUERY, PASSAGES, attention=True):
        (alone,) = adapter(lm.pairs(prompt.rows(QUERY, each.passage), adapter, None)).attention
        assert torch.allclose(torch.tensor(each.attention), alone, atol=1e-6)


def test_a_cut_passage_is_shown_as_far_as_it_was_read(lm, saved):
    folder = saved("qpeft_r", max_passage_tokens=3)
    found = explain(open_scorer(lm, folder), QUERY, PASSAGES)
    assert [len(each.tokens) for each in found[:3]] == [3, 3, 3]
    assert found[0].truncated
    assert "".join(token.text for token in found[0].tokens) == "Sea The sea"
    check_against_scoring(lm, folder, "plain", found)


def test_equal_scores_keep_the_order_given(lm):
    passages = [
        Passage(name, text) for name, text in (("0", "sea"), ("1", "sea"), ("2", "the sky is blue"), ("3", "sea"))
    ]
    found = {each.passage.id: each.rank for each in explain(build_scorer(Config(), lm), QUERY, passages)}
    assert found["0"] < found["1"] < found["3"]
    assert sorted(found.values()) == [1, 2, 3, 4]


def test_an_encoder_decoder_is_explained_without_an_adapter(t5, tmp_path):
    found = explain(build_scorer(Config(), t5), QUERY, PASSAGES)
    scores = build_scorer(Config(), t5).score([(QUERY, passage) for passage in PASSAGES])
    assert [each.score for each in found] == pytest.approx(scores, abs=1e-4)
    with pytest.raises(OptionError, match="decoder-only"):
        explain(open_scorer(t5, tmp_path), QUERY, PASSAGES)


def test_what_cannot_be_explained_is_named(lm, saved):
    with pytest.raises(OptionError, match="--template upr"):
        explain(open_scorer(lm, saved("soft_prompt"), template="upr"), QUERY, PASSAGES)
    with pytest.raises(InputError, match="'e' has no tokens"):
        explain(build_scorer(Config(), lm), QUERY, [*PASSAGES, Passage("e", " ")])
    with pytest.raises(InputError, match="empty"):
        explain(build_scorer(Config(), lm), Query("q", " "), PASSAGES)
    with pytest.raises(ScoreError, match="twice"):
        explain(build_scorer(Config(), lm), QUERY, [PASSAGES[0], PASSAGES[0]])


@pytest.mark.parametrize(
    "text", ["Why, the WHY of 1 sky?", "Zoë’s naïve façade — 日本語 🙂 end", "x", "  why\nthe  why "]
)
def test_pieces_of_a_text_join_to_it(tokenizer, text):
    for lead in ("", " "):
        ids = tokenizer(lead + text, add_special_tokens=False)["input_ids"]
        found = pieces(tokenizer, ids, text)
        assert len(found) == len(ids)
        assert "".join(found).strip() == text.strip()
        half = pieces(tokenizer, ids[: len(ids) // 2], text)
        assert text.startswith("".join(half))


def test_pieces_without_a_text_are_decoded(tokenizers):
    for name, tokenizer in tokenizers.items():
        ids = tokenizer("why the why", add_special_tokens=False)["input_ids"]
        joined = "".join(pieces(tokenizer, ids, "another text"))
        assert joined.replace(" ", "") == "whythewhy"
        assert (joined == "why the why") == (name == "bytes")
    special = tokenizers["wordpiece"].eos_token_id
    assert pieces(tokenizers["wordpiece"], [special]) == ["[SEP]"]


def test_words_say_where_a_word_goes_on():
    assert words(["Ray", "leigh", "'", "s", " law", ",", " ", ""]) == ["Ray", "…leigh", "'", "s", "law", ",", "␣", "·"]


def test_equal_words_are_read_together():
    tokens = (PassageToken("The", None, 0.2), PassageToken(" sky", None, 0.5), PassageToken(" the", None, 0.295))
    each = Explanation(PASSAGES[0], (), (*tokens, PassageToken(".", None, 0.005)), -1.0, 1)
    assert [word for word, _ in most_read(each)] == ["sky", "the"]
    assert most_read(each, 1) == [("sky", 0.5)]


class Seen(html.parser.HTMLParser):
    """Collects tags and text, and checks that elements nest."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        assert not {key for key, _ in attrs} & {"src", "href"}
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def example(name, rank, hinted_rank, **more):
    query = (QueryToken("why", -3.0, -1.25), QueryToken(" <b>", -2.0, -2.5))
    tokens = (PassageToken("<script>", 1), PassageToken(" of"), PassageToken(" sky", None, 0.25))
    passage = Passage(name, "text & more", f"title {name} <i>")
    return Explanation(passage, query, tokens, -2.5, rank, -1.875, hinted_rank, ("<script>",), **more)


def test_the_page_says_what_the_explanations_say():
    page = explanation_page(
        [("first <u>", [example("x", 3, 2), example("y", 1, 3, truncated=True), example("z", 2, 1)]), ("second", [])],
        "A & B",
    )
    seen = Seen(page)
    assert not {"script", "u"} & set(seen.tags)
    text = " ".join(seen.text.split())
    assert "A & B" in text
    assert text.index("title z <i>") < text.index("title x <i>") < text.index("title y <i>")
    assert all(mark in text for mark in ("↑1", "↓2", "up 1, from rank 3", "down 2, from rank 1"))
    assert "−2.50 → −1.88 (+0.62)" in text
    assert text.count("why+1.75") == 3
    assert "log P −3.00 → −1.25 nats" in page
    assert "25.0% of the attention" in page
    assert "hint word 1" in page
    assert text.count("cut here") == 1
    assert "second" in text
    assert not re.search(r"url\(|@import|https?://", page)


def test_the_page_without_adapter_shows_likelihoods(lm):
    seen = Seen(explanation_page([(QUERY.text, explain(build_scorer(Config(), lm), QUERY, PASSAGES))], "alone"))
    assert "adapter" not in seen.text
    assert "SKY" in seen.text


@pytest.mark.parametrize("name", ["qpeft_r", "qpeft_a", "soft_prompt"])
def test_the_page_of_real_explanations(lm, saved, name):
    found = explain(open_scorer(lm, saved(name)), QUERY, PASSAGES, attention=True)
    text = Seen(explanation_page([(QUERY.text, found)], name)).text
    assert ("what each query token reads" in text) == (name == "qpeft_a")
    assert ("word of the hint" in text) == (name == "qpeft_r")
    assert text.count("most read") == (4 if name == "qpeft_a" else 0)


def test_only_query_likelihood_is_explained(make_lm, tmp_path):
    lm = make_lm("llama")
    adapter = build("soft_prompt", lm)
    save_adapter(tmp_path / "a", "soft_prompt", adapter, lm, load_template("yes_no"), method="yes_no")
    with pytest.raises(OptionError, match="only a scorer of query likelihood can be explained"):
        explain(open_scorer(lm, tmp_path / "a"), QUERY, PASSAGES)
    with pytest.raises(OptionError, match="--template rankllama: it has no target"):
        explain(build_scorer(Config(template="rankllama"), lm), QUERY, PASSAGES)
