import unicodedata

import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st

from qpeft.evaluation.answers import has_answer


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        ("It will focus on us.", "us", True),
        ("It will focus.", "us", False),
        ("the United States of America", "united states", True),
        ("the United and other States", "united states", False),
        ("states united", "united states", False),
        # Accents, composed and decomposed, and their absence.
        ("Beyoncé sang", "Beyonce\u0301", True),
        ("Beyonce\u0301 sang", "BEYONCÉ", True),
        ("Beyoncé sang", "Beyonce", False),
        # Punctuation is a token of its own.
        ("in the U.S. today", "U.S.", True),
        ("in the U. S. today", "U.S.", True),
        ("in the US today", "U.S.", False),
        ("Levi's Stadium", "levi's stadium", True),
        ("Levi s Stadium", "levi's stadium", False),
        ("it costs $5,000.", "$5,000", True),
        ("it costs 5,000", "$5,000", False),
        ("it costs 5 000", "5,000", False),
        ("a well-known man", "well - known", True),
        ("snake_case", "snake", True),
        ("1999", "99", False),
        ("24\u201310", "24\u201310", True),
        # Letters without case, marks, fullwidth, ligatures and emoji.
        ("東京 は", "東京", True),
        ("東京都", "東京", False),
        ("हिन्दी भाषा", "हिन्दी", True),
        ("the 🎉 party", "🎉", True),
        # Blank and control characters only separate.
        ("New\u00a0York\u200bCity", "new york city", True),
        ("end of\ntext", "of text", True),
        # Nothing to look for.
        ("anything", "", False),
        ("anything", " \u200b\t", False),
        ("", "", False),
        ("", "a", False),
    ],
)
def test_rule(text, answer, expected):
    assert has_answer(text, [answer]) is expected


def test_any_answer_will_do():
    assert has_answer("the cat", ["dog", "", "cat"])
    assert not has_answer("the cat", [])


def test_a_string_is_not_a_list_of_answers():
    with pytest.raises(TypeError, match="not one string"):
        has_answer("the cat", "cat")


words = st.lists(st.text(st.characters(categories=("L", "N")), min_size=1, max_size=4), min_size=1, max_size=6)


@given(words, st.data())
def test_any_stretch_of_whole_words_is_found(text, data):
    start = data.draw(st.integers(0, len(text) - 1))
    end = data.draw(st.integers(start + 1, len(text)))
    assert has_answer(" ".join(text), ["\n".join(text[start:end])])
    assert not has_answer(" ".join(text), ["x".join([*text, "more"])])


@given(st.text(max_size=20), st.text(max_size=5))
def test_same_as_dpr_where_the_answer_has_tokens(text, answer):
    def tokens(string):
        found = regex.findall(r"[\p{L}\p{N}\p{M}]+|[^\p{Z}\p{C}]", unicodedata.normalize("NFD", string))
        return [token.lower() for token in found]

    if any(unicodedata.category(char) == "Cn" for char in text + answer):
        return  # the two may follow different versions of Unicode
    needle, haystack = tokens(answer), tokens(text)
    expected = any(haystack[i : i + len(needle)] == needle for i in range(len(haystack))) if needle else False
    assert has_answer(text, [answer]) is expected
