import json

import pytest

from qpeft.data.squad import read_squad
from qpeft.errors import FormatError
from qpeft.types import Passage, Query


def squad(*qas, context="Oxygen is  a gas."):
    return {"version": "x", "data": [{"title": "Some_Gas", "paragraphs": [{"context": context, "qas": list(qas)}]}]}


def write(folder, value):
    path = folder / "squad.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def test_squad_1(tmp_path):
    answers = [{"text": "gas", "answer_start": 13}, {"text": "a gas", "answer_start": 11}, {"text": "gas"}]
    data = read_squad(write(tmp_path, squad({"id": "q1", "question": "What is oxygen?", "answers": answers})))
    (passage,) = data.passages.values()
    assert (passage.title, passage.text) == ("Some Gas", "Oxygen is  a gas.")
    assert data.queries == {"q1": Query("q1", "What is oxygen?", ("gas", "a gas"))}
    assert data.qrels == {"q1": {passage.id: 1}}


def test_squad_2_leaves_out_the_impossible(tmp_path):
    data = read_squad(
        write(
            tmp_path,
            squad(
                {"id": "no", "question": "?", "is_impossible": True, "answers": [], "plausible_answers": []},
                {"id": "yes", "question": "?", "is_impossible": False, "answers": [{"text": "a"}]},
            ),
        )
    )
    assert list(data.queries) == list(data.qrels) == ["yes"]
    assert len(data.passages) == 1


def test_ids_are_the_same_in_every_file_and_equal_paragraphs_are_one(tmp_path):
    value = squad({"id": "a", "question": "?", "answers": []})
    value["data"].append(squad({"id": "b", "question": "?", "answers": []})["data"][0])
    data = read_squad(write(tmp_path, value))
    assert len(data.passages) == 1
    assert data.passages == read_squad(write(tmp_path, squad())).passages
    assert isinstance(next(iter(data.passages.values())), Passage)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("{\n\n oops", r"squad\.json:3: not JSON"),
        ([], "not SQuAD: no 'data'"),
        ({"data": 3}, "'data' is 3, not a list"),
        ({"data": [3]}, r"data\[0\]: 3 is not a JSON object"),
        ({"data": [{"paragraphs": [{}]}]}, r"data\[0\], paragraphs\[0\]: no 'context'"),
        (squad({"id": "a"}), r"qas\[0\]: no 'question'"),
        (squad({"question": "?"}), r"qas\[0\]: no 'id'"),
        (squad(*[{"id": "a", "question": "?"}] * 2), "question 'a' occurs twice"),
    ],
)
def test_malformed(tmp_path, value, message):
    with pytest.raises(FormatError, match=message):
        read_squad(write(tmp_path, value))
