import json

import pytest

from qpeft.data.dpr import LabelledCandidates, read_dpr_training, read_evidence, read_retrieved, retrieved_ids
from qpeft.errors import FormatError
from qpeft.types import Candidates, Passage, Query

CONTEXTS = [
    {"id": 12, "title": "T", "text": "x", "score": "8.5", "has_answer": True},
    {"id": "wiki:3", "title": "", "text": "y", "score": 1, "has_answer": False},
]
EXPECTED = LabelledCandidates(
    Candidates(Query("0", "who?", ("me", "I")), (Passage("12", "x", "T"), Passage("wiki:3", "y")), (8.5, 1.0)),
    (True, False),
)


def write(folder, value, name="a.json"):
    path = folder / name
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def question(**fields):
    return {"question": "who?", "answers": ["me", "I"], "ctxs": CONTEXTS} | fields


def test_list(tmp_path):
    path = write(tmp_path, [question(), question(question="why?")])
    first, second = read_retrieved(path)
    assert first == EXPECTED
    assert second.candidates.query == Query("1", "why?", ("me", "I"))
    assert retrieved_ids(path) == {"12", "wiki:3"}


def test_object_and_contexts(tmp_path):
    fields = question()
    fields["contexts"] = fields.pop("ctxs")
    (item,) = read_retrieved(write(tmp_path, {"77": fields}))
    assert item.candidates.query.id == "77"
    assert item.candidates.passages == EXPECTED.candidates.passages


@pytest.mark.parametrize("wrapped", ["[CLS] who? [SEP]", "who? [SEP]", "[CLS] who? [SEP] [PAD] [PAD]", " who? "])
def test_wrappers_are_removed(tmp_path, wrapped):
    assert read_retrieved(write(tmp_path, [question(question=wrapped)])) == [EXPECTED]


def test_evidence_fills_in_texts(tmp_path):
    contexts = [{"id": "2", "score": 1.0}, {"id": 1, "score": 0.5}]
    path = write(tmp_path, [question(ctxs=contexts)])
    evidence = {"1": Passage("1", "one"), "2": Passage("2", "two", "T")}
    (item,) = read_retrieved(path, evidence)
    assert item.candidates.passages == (evidence["2"], evidence["1"])
    assert item.labels == ()
    with pytest.raises(FormatError, match=r"question 0, ctxs\[1\]: passage '1' has no text here and is not in"):
        read_retrieved(path, {"2": evidence["2"]})


def test_scores_and_answers_may_be_missing(tmp_path):
    (item,) = read_retrieved(write(tmp_path, [{"question": "?", "ctxs": [{"id": 1, "text": "x"}]}]))
    assert item == LabelledCandidates(Candidates(Query("0", "?"), (Passage("1", "x"),)))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[", "not JSON"),
        (3, "neither a list nor an object"),
        ([3], "question 0: 3 is not"),
        ([{"ctxs": []}], "question 0: no 'question'"),
        ([{"question": "?"}], "no 'ctxs' or 'contexts'"),
        ([question(answers="me"), question(answers=[1])], "question 1: 'answers' holds 1"),
        ([question(ctxs=[{"text": "x"}])], r"ctxs\[0\]: no '_id'"),
        ([question(ctxs=CONTEXTS * 2)], "a passage occurs twice"),
        ([question(ctxs=[CONTEXTS[0] | {"score": "high"}])], "score 'high' is not a finite"),
        ([question(ctxs=[CONTEXTS[0] | {"score": "NaN"}])], "score 'NaN' is not a finite"),
        ([question(ctxs=[CONTEXTS[0] | {"score": True}])], "score True is not a finite"),
        ([question(ctxs=[CONTEXTS[0] | {"score": 10**400}])], "is not a finite"),
        ('{"\\ud83d": {"question": "?", "ctxs": []}}', "the id '.ud83d' has half a character"),
        ('[{"question": ' + "9" * 5000 + "}]", "integer of too many digits"),
        ("[" * 3000 + "]" * 3000, "nested too deep"),
        ([question(ctxs=[CONTEXTS[0] | {"has_answer": "yes"}])], "'has_answer' is 'yes'"),
        ([question(ctxs=[CONTEXTS[0], CONTEXTS[1] | {"score": None}])], "1 of 2 passages have a 'score'"),
        ([question(ctxs=[CONTEXTS[0], CONTEXTS[1] | {"has_answer": None}])], "1 of 2 passages have a 'has_answer'"),
    ],
)
def test_malformed_results(tmp_path, value, message):
    with pytest.raises(FormatError, match=message):
        read_retrieved(write(tmp_path, value))


def test_training(tmp_path):
    value = [
        {
            "question": "who?",
            "answers": ["me"],
            "positive_ctxs": [{"title": "T", "text": "x", "passage_id": "5", "score": 1000}],
            "negative_ctxs": [{"title": "", "text": "easy", "psg_id": 6}],
            "hard_negative_ctxs": [{"title": "", "text": "hard"}],
        },
        {"question": "no positive", "answers": [], "positive_ctxs": [], "negative_ctxs": []},
        {"question": "bare", "answers": [], "positive_ctxs": [{"text": "hard"}]},
    ]
    groups = read_dpr_training(write(tmp_path, value))
    assert [group.query for group in groups] == [Query("0", "who?", ("me",)), Query("2", "bare")]
    assert groups[0].positives == (Passage("5", "x", "T"),)
    assert [passage.text for passage in groups[0].negatives] == ["hard", "easy"]
    # Without an id, equal content is the same passage.
    assert groups[0].negatives[0] == groups[1].positives[0]


def test_evidence(tmp_path):
    content = 'id\ttext\ttitle\n1\t"He said ""no"", and\nleft."\tA b\n2\tplain "quoted" word\tC\n'
    assert list(read_evidence(write(tmp_path, content, "w.tsv"))) == [
        Passage("1", 'He said "no", and\nleft.', "A b"),
        Passage("2", 'plain "quoted" word', "C"),
    ]
    path = write(tmp_path, "title\ttext\tid\nA b\tx y\t1\n", "w.tsv")
    assert list(read_evidence(path)) == [Passage("1", "x y", "A b")], "columns go by their names"
    long = "word " * 30_000
    assert list(read_evidence(write(tmp_path, f"id\ttext\ttitle\n1\t{long}\tA\n", "w.tsv"))) == [
        Passage("1", long, "A")
    ]


@pytest.mark.parametrize(
    ("content", "line", "message"),
    [
        ("", 1, "the header is"),
        ("1\tx\ty\n", 1, "the header is"),
        ("id\ttext\ttitle\n1\tx\ty\n\n2\tx\n", 4, "2 columns"),
        ('id\ttext\ttitle\n1\t"x"y\tz\n', 2, "broken quoting"),
        ('id\ttext\ttitle\n1\t"x\tz\n', 2, "broken quoting"),
    ],
)
def test_malformed_evidence(tmp_path, content, line, message):
    with pytest.raises(FormatError, match=message) as caught:
        list(read_evidence(write(tmp_path, content)))
    assert caught.value.line == line
