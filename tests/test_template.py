import dataclasses
import itertools
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from qpeft.errors import FormatError, InputError, OptionError, QueryError
from qpeft.kept_tokens import KeptTokens
from qpeft.template import Prompt, Template, available_templates, load_template
from qpeft.types import Passage, Query

QUERY = Query("q1", "why is the sky blue?")
PASSAGE = Passage("p", "the light of the moon", "moon")


@pytest.mark.parametrize("template", [name for name in available_templates() if load_template(name).target])
def test_a_query_has_the_same_tokens_behind_every_passage(tokenizer, template):
    prompt = Prompt(load_template(template), tokenizer, 512)
    texts = ["x", "the sea.", "ends in a space ", "éàü", "who"]
    assert len({prompt.rows(QUERY, Passage("p", text))[0].target for text in texts}) == 1


def test_spaces_stand_where_each_tokenizer_puts_them(tokenizers):
    texts = {}
    for name, tokenizer in tokenizers.items():
        row = Prompt(load_template("plain"), tokenizer, 512).rows(QUERY, Passage("p", "the sea"))[0]
        texts[name] = tokenizer.convert_ids_to_tokens([*row.context, *row.target])
    assert "Ġwhy" in texts["bytes"], "a byte-level word carries the space before it"
    assert "▁why" in texts["metaspace"]
    pairs = itertools.pairwise(texts["metaspace"])
    assert not any(a == "▁" and b.startswith("▁") for a, b in pairs), "it adds the space itself"
    assert texts["wordpiece"][0] == "[CLS]"
    assert texts["metaspace"][0] == "<s>"
    assert "<eos>" not in texts["bytes"], "no BOS where the tokenizer has none"
    special = {"[CLS]", "[SEP]", "<s>", "</s>"}
    assert not any(special & set(pieces[1:]) for pieces in texts.values()), "nothing special within"


@pytest.mark.parametrize("ahead", [False, True])
def test_special_tokens_are_words_in_texts_and_meant_in_templates(tokenizer, ahead):
    names = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    end = tokenizer.eos_token
    prompt = Prompt(Template("end", 1, f"{{passage}}{end}", "{query}"), tokenizer, 512)
    passage, query = Passage("p", f"the {' '.join(names)} sky", end), Query("q", f"why {end} is")
    if ahead:
        prompt.read_ahead([passage])
    (row,) = prompt.rows(query, passage)
    begin, stop = row.passage
    inside = {*row.context[begin:stop], *row.query, *row.target}
    assert not inside & {*tokenizer.all_special_ids} - {tokenizer.unk_token_id}
    assert row.context[stop:] == (tokenizer.eos_token_id,)
    if tokenizer.unk_token_id is None:
        assert end in tokenizer.decode(row.query)
    assert not tokenizer._tokenizer.encode_special_tokens, "threads share it"
    again = Prompt(Template("end", 1, f"{{passage}}{end}", "{query}"), tokenizer, 512)
    assert again.rows(QUERY, PASSAGE) == prompt.rows(QUERY, PASSAGE)
    assert tokenizer(end, add_special_tokens=False)["input_ids"] == [tokenizer.eos_token_id]


def test_a_blank_between_context_and_target_is_not_lost(tokenizers):
    template = Template("blank", 1, "Text: {passage} {hint} ", "{query}")
    for name, first in (("bytes", "Ġwhy"), ("metaspace", "▁why"), ("wordpiece", "why")):
        tokenizer = tokenizers[name]
        row = Prompt(template, tokenizer, 512).rows(QUERY, PASSAGE)[0]
        assert tokenizer.convert_ids_to_tokens(row.target[0]) == first
    # An encoder ends its text there, so that the decoder begins without.
    apart = Prompt(template, tokenizers["bytes"], 512, separate_target=True).rows(QUERY, PASSAGE)[0]
    assert tokenizers["bytes"].convert_ids_to_tokens(apart.target[0]) == "why"


def test_braces_are_only_text():
    template = Template("braces", 1, "{passage}", "{query}", passage="{ {title}: {text} }")
    assert template.passage_text(Passage("p", "a {title} {0}", "{text}")) == "{ {text}: a {title} {0} }"


def test_only_the_query_is_scored_unless_the_template_says_so(tokenizer):
    plain = Prompt(load_template("plain"), tokenizer, 512).rows(QUERY, PASSAGE)[0]
    upr = Prompt(load_template("upr"), tokenizer, 512).rows(QUERY, PASSAGE)[0]
    assert not plain.scored[0]
    assert plain.scored[-1]
    assert plain.target[-1] != tokenizer.eos_token_id
    assert all(upr.scored)
    assert upr.target[-1] == tokenizer.eos_token_id


def test_the_authors_layout_scores_begin_and_end(tokenizer):
    authors = Prompt(load_template("qpeft_authors"), tokenizer, 512).rows(QUERY, PASSAGE)[0]
    ours = Prompt(load_template("qpeft"), tokenizer, 512).rows(QUERY, PASSAGE)[0]
    assert (authors.context, authors.passage, authors.hint) == (ours.context, ours.passage, ours.hint)
    marks = [[] if mark is None else [mark] for mark in (tokenizer.bos_token_id, tokenizer.eos_token_id)]
    assert authors.target == (*marks[0], *ours.target, *marks[1])
    assert all(authors.scored)
    assert authors.query == ours.query == ours.target, "what adapters read has no marks"
    hint = tokenizer.convert_ids_to_tokens(authors.context[authors.hint :])
    assert "".join(hint).lstrip("▁Ġ").lower().startswith("question"), "the hint stands before the answer cue"


def test_adapters_read_a_template_from_behind_its_instruction_to_its_cue(tokenizer):
    row = Prompt(load_template("qpeft_authors"), tokenizer, 512).rows(QUERY, PASSAGE)[0]
    begin, end = row.read(template=True, states=False)
    text = tokenizer.decode(row.context[begin:end]).strip().lower()
    assert text.startswith("passage")
    assert "question" in text[-12:]
    assert "generate" in tokenizer.decode(row.context[:begin]).lower()
    assert row.read(template=True, states=True) == (begin, row.hint), "behind the hint there are no states"
    assert row.read(template=False, states=False) == row.passage
    bare = Prompt(load_template("qpeft"), tokenizer, 512).rows(QUERY, PASSAGE)[0]
    assert bare.body == int(tokenizer.bos_token_id is not None)


def test_an_instruction_has_no_places():
    with pytest.raises(InputError, match="instruction has no places"):
        Template("wrong", 1, "{passage}", "{query}", instruction="of {passage}")


def test_begin_stands_between_cue_and_query(tokenizers):
    template = Template("begin", 1, "{passage}", "Question: {query}", score_begin=True)
    row = Prompt(template, tokenizers["metaspace"], 512).rows(QUERY, PASSAGE)[0]
    place = row.target.index(tokenizers["metaspace"].bos_token_id)
    assert place == row.scored.index(True) > 0
    assert row.target[place + 1 :] == row.query


def test_passages_are_cut_at_their_end_and_nothing_else_is(tokenizer):
    long = Passage("p", " ".join(["the light of the old red moon"] * 40))
    whole = Prompt(load_template("qpeft"), tokenizer, 100_000).rows(QUERY, long)[0]
    limit = 300
    cut = Prompt(load_template("qpeft"), tokenizer, limit).rows(QUERY, long)[0]
    assert (whole.truncated, cut.truncated) == (False, True)
    assert len(cut) == limit
    assert cut.target == whole.target
    end = cut.passage[1]
    assert cut.context[:end] == whole.context[:end]
    assert cut.context[end:] == whole.context[whole.passage[1] :]
    bounded = Prompt(load_template("qpeft"), tokenizer, 100_000, max_passage_tokens=7).rows(QUERY, long)[0]
    assert bounded.passage[1] - bounded.passage[0] == 7


def test_a_bound_on_one_passage_stands_beside_that_of_the_prompt(tokenizer):
    prompt = Prompt(load_template("plain"), tokenizer, 256, max_passage_tokens=5)
    long = Passage("p", "the sea is salty " * 10)
    for bound, length in ((None, 5), (3, 3), (9, 5)):
        (row,) = prompt.rows(QUERY, long, max_passage_tokens=bound)
        assert row.passage[1] - row.passage[0] == length
        assert row.truncated


def test_tokens_are_kept_up_to_so_many_characters():
    kept = KeptTokens(10)
    made = []

    def get(text, space=False):
        return kept.get(text, space, lambda: made.append((text, space)) or [len(text), space])

    assert [get("four"), get("four"), get("four", True)] == [(4, False), (4, False), (4, True)]
    assert made == [("four", False), ("four", True)]
    get("four")  # so that the other is the oldest
    get("six ty")
    get("four")
    assert made == [("four", False), ("four", True), ("six ty", False)]
    get("four", True)
    assert made[-1] == ("four", True)
    get("longer than ten")  # is not kept itself, and everything else had to go
    get("four")
    assert made[-2:] == [("longer than ten", False), ("four", False)]


def test_threads_share_kept_tokens():
    kept = KeptTokens(200)
    texts = [f"{number:010}" for number in range(30)]
    together = threading.Barrier(6)

    def read(seed):
        together.wait()
        for turn in range(300):
            text = texts[(turn * 7 + seed) % len(texts)]
            if turn % 3:
                assert kept.get(text, False, lambda text=text: [int(text)]) == (int(text),)
            else:
                kept.read_ahead([text], False, lambda new: [[int(each)] for each in new])

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(read, range(6)))
    for text in texts:
        kept.get(text, False, lambda text=text: [int(text)])
    made = []
    kept.read_ahead(texts[-20:], False, lambda new: made.append(new) or [[0]] * len(new))
    assert not made, "there is still room for twenty"


def test_prompts_share_kept_tokens_whatever_stands_before_the_passage(tokenizers):
    tokenizer = tokenizers["bytes"]
    spaced = Template("spaced", 1, "text: {passage}", "query: {query}")
    bare = Template("bare", 1, "{passage}", "query: {query}")
    kept = KeptTokens()
    for template in (spaced, bare, spaced):
        shared = Prompt(template, tokenizer, 512, kept=kept).rows(QUERY, PASSAGE)
        assert shared == Prompt(template, tokenizer, 512).rows(QUERY, PASSAGE)


def test_a_query_that_leaves_no_room_is_an_error(tokenizer):
    fixed = len(Prompt(load_template("plain"), tokenizer, 512).rows(QUERY, Passage("p", ""))[0])
    assert Prompt(load_template("plain"), tokenizer, fixed + 1).rows(QUERY, PASSAGE)[0].truncated
    with pytest.raises(QueryError, match=r"'q1' needs .* never cut"):
        Prompt(load_template("plain"), tokenizer, fixed).rows(QUERY, PASSAGE)


def test_long_queries_stay_whole(tokenizer):
    words = "why is the sky blue and who was the king" * 100
    row = Prompt(load_template("plain"), tokenizer, 100_000).rows(Query("long", words), PASSAGE)[0]
    query = [token for token, scored in zip(row.target, row.scored, strict=True) if scored]
    assert tokenizer.decode(query).split() == words.split()


@pytest.mark.parametrize("text", ["", "   ", "?", " ? ?"])
def test_empty_queries(tokenizer, text):
    with pytest.raises(QueryError, match="'q9' is empty"):
        Prompt(load_template("plain"), tokenizer, 512).rows(Query("q9", text), PASSAGE)


@pytest.mark.parametrize(
    ("option", "text", "expected"),
    [
        ("keep", "Who was it ?", "Who was it ?"),
        ("add", "Who was it", "Who was it?"),
        ("add", "Who was it ?", "Who was it?"),
        ("strip", "Who was it??", "Who was it"),
    ],
)
def test_question_mark(option, text, expected):
    template = dataclasses.replace(load_template("plain"), question_mark=option)
    assert template.query_text(Query("q", text)) == expected
    lower = dataclasses.replace(template, lowercase=True)
    assert lower.query_text(Query("q", text)) == expected.lower()


@pytest.mark.parametrize(("window", "overlap"), [(10, 0), (10, 3), (7, 6), (1000, 5)])
def test_windows_cover_the_passage_with_the_stated_overlap(tokenizer, window, overlap):
    prompt = Prompt(load_template("plain"), tokenizer, 100_000)
    passage = Passage("p", "the light of the old red moon on the salty sea was blue and long")
    whole = prompt.rows(QUERY, passage)[0]
    tokens = whole.context[slice(*whole.passage)]
    pieces = [row.context[slice(*row.passage)] for row in prompt.rows(QUERY, passage, windows=window, overlap=overlap)]
    rebuilt = list(pieces[0])
    for before, piece in itertools.pairwise(pieces):
        assert overlap == 0 or before[-overlap:] == piece[:overlap]
        rebuilt += piece[overlap:]
    assert tuple(rebuilt) == tokens
    assert all(len(piece) <= window for piece in pieces)
    with pytest.raises(OptionError, match="cannot overlap"):
        prompt.rows(QUERY, passage, windows=5, overlap=5)


def test_place_of_the_hint(tokenizer):
    suffix = Prompt(load_template("qpeft"), tokenizer, 512).rows(QUERY, PASSAGE)[0]
    assert suffix.passage[1] <= suffix.hint < len(suffix.context)
    template = Template("prefix", 1, "Hints: {hint} Passage: {passage}", "{query}")
    prefix = Prompt(template, tokenizer, 512).rows(QUERY, PASSAGE)[0]
    assert 0 < prefix.hint < prefix.passage[0]
    assert Prompt(Template("none", 1, "a {passage}", "{query}"), tokenizer, 512).rows(QUERY, PASSAGE)[0].hint is None


def test_room_is_kept_for_hints_of_the_query_that_is_read(tokenizers):
    prompt = Prompt(load_template("plain"), tokenizers["wordpiece"], 64, hint_length=lambda tokens: 2 * tokens)
    passage = Passage("p", "the sea " * 100)
    for read in (None, Query("r", "who"), Query("s", "who was the old king of the city?")):
        (row,) = prompt.rows(QUERY, passage, hint_query=read)
        assert len(row) + 2 * len(row.query) == 64


FINGERPRINTS = {
    "plain": "ab032966628d0b58",
    "qpeft": "e85af3ddb469fa71",
    "qpeft_authors": "be5dfbfd281fe7a0",
    "qpeft_prefix": "136a037b45fb51f7",
    "upr": "dbc7c9767287a894",
}
"""Adapter folders and published results name them."""


def test_fingerprints_stay_what_they_are():
    assert {name: load_template(name).fingerprint[:16] for name in FINGERPRINTS} == FINGERPRINTS


# Templates without a target

PAIR = {
    "query first": Template("q", 1, "query: {query} document: {passage}"),
    "passage first": Template("p", 1, "document: {passage} query: {query} relevant:", end=True),
    "bare": Template("b", 1, "{query} {passage}"),
}


@pytest.mark.parametrize("form", PAIR)
def test_a_pair_has_the_tokens_of_its_whole_text(tokenizer, form):
    template = PAIR[form]
    (row,) = Prompt(template, tokenizer, 512).rows(QUERY, PASSAGE)
    text = template.context.format(query=QUERY.text, passage="moon the light of the moon")
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    end = [tokenizer.eos_token_id] if template.end else []
    assert list(row.context) == [*begin, *tokenizer(text, add_special_tokens=False)["input_ids"], *end]
    assert (row.target, row.scored, row.hint) == ((), (), None)
    assert tokenizer.decode(row.query).strip().startswith("why is the sky blue")
    assert tokenizer.decode(row.context[slice(*row.passage)]).strip() == "moon the light of the moon"


@pytest.mark.parametrize("form", PAIR)
def test_of_a_pair_the_passage_is_cut_and_never_the_query(tokenizer, form):
    prompt = Prompt(PAIR[form], tokenizer, 60)
    whole = prompt.rows(QUERY, Passage("p", "the sea"))[0]
    assert not whole.truncated
    (row,) = prompt.rows(QUERY, Passage("p", "the sea " * 60))
    assert row.truncated
    assert len(row) == 60
    assert row.query == whole.query
    start, end = row.passage
    joined = "".join(map(chr, row.context))
    assert "".join(map(chr, row.query)) in joined[:start] + joined[end:]
    pieces = prompt.rows(QUERY, Passage("p", "the sea " * 60), windows=1_000, overlap=2)
    assert len(pieces) > 2
    assert {piece.context[: piece.passage[0]] for piece in pieces} == {row.context[:start]}
    with pytest.raises(QueryError, match="leaves no room for a passage; the limit is 60"):
        prompt.rows(Query("q", "why is it so " * 30), PASSAGE)


def test_hints_of_pairs_stand_where_the_template_says(tokenizers):
    template = Template("h", 1, "a {hint} b {query} c {passage} d")
    (row,) = Prompt(template, tokenizers["wordpiece"], 64, hint_length=lambda query: 9).rows(QUERY, PASSAGE)
    assert tokenizers["wordpiece"].convert_ids_to_tokens(row.context[row.hint]) == "b"
    assert len(row) <= 64 - 9
    other = Prompt(template, tokenizers["wordpiece"], 64).rows(QUERY, PASSAGE, hint_query=Query("x", "who"))[0]
    assert (other.context, len(other.query)) == (row.context, 1), "only what an adapter reads is another query's"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"context": "{passage}"}, "missing: target"),
        ({"context": "{query}"}, "{passage} and {query} is needed"),
        ({"context": "{passage} {query}", "target": "{query}"}, "context holds {hint} and {passage}"),
        ({"context": "{passage} {query} {query}"}, "at most once"),
        ({"context": "{passage}", "target": "{query}", "end": True}, "score_end scores EOS"),
    ],
)
def test_pair_templates_that_cannot_be(options, words):
    with pytest.raises(InputError, match=re.escape(words)):
        Template("t", 1, **options)


def test_fingerprint_changes_with_what_can_change_a_score():
    template = load_template("plain")
    assert dataclasses.replace(template, description="other words").fingerprint == template.fingerprint
    changes = {"version": 2, "context": "x {passage}", "target": "{query}", "passage": "{text}", "lowercase": True}
    changes |= {"question_mark": "add", "score_cue": True, "score_end": True, "score_begin": True}
    prints = {dataclasses.replace(template, **{field: value}).fingerprint for field, value in changes.items()}
    assert len(prints | {template.fingerprint}) == len(changes) + 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b", "mapping"),
        ("name: [", "not valid YAML"),
        ("name: a\nversion: 1\ncontext: '{passage}'", "missing: target"),
        ("name: a\nversion: 1\ncontext: '{passage}'\ntarget: '{query}'\ntargte: x", "did you mean 'target'"),
        ("name: a\nversion: true\ncontext: '{passage}'\ntarget: '{query}'", "version must be a int, not True"),
        ("name: a\nversion: x\ncontext: '{passage}'\ntarget: '{query}'", "version must be a int"),
        ("name: a\nversion: 1\ncontext: 'no place'\ntarget: '{query}'", "{passage} is needed"),
        ("name: a\nversion: 1\ncontext: '{passage} {query}'\ntarget: '{query}'", "context holds"),
        ("name: a\nversion: 1\ncontext: '{passage}'\ntarget: '{query} ?'", "must end with"),
        (
            "name: a\nversion: 1\ncontext: '{passage}'\ntarget: '{query}'\nquestion_mark: maybe",
            "question_mark is one of",
        ),
    ],
)
def test_malformed_templates(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(FormatError, match=r"mine\.yaml") as error:
        load_template(str(path))
    assert message in str(error.value)


def test_a_template_that_is_no_text(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_bytes("name: für\n".encode("latin-1"))
    with pytest.raises(FormatError, match=r"mine\.yaml: cannot be read: 'utf-8' codec"):
        load_template(str(path))


def test_user_template_and_unknown_name(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\nversion: 3\ncontext: 'Text: {passage}'\ntarget: 'Q: {query}'\nlowercase: true\n")
    assert load_template(str(path)) == Template("mine", 3, "Text: {passage}", "Q: {query}", lowercase=True)
    with pytest.raises(OptionError, match="did you mean 'plain'"):
        load_template("plian")
