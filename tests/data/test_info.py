import pytest

from qpeft.data.beir import BeirCollection
from qpeft.data.info import info


def test_info(beir):
    found = info(beir)
    assert found["fingerprint"] == beir.fingerprint()
    del found["fingerprint"]
    assert found == {
        "name": "cats",
        "passages": 3,
        "passages_with_title": 2,
        "mean_passage_words": 5.0,
        "splits": {
            "dev": {
                "queries": 1,
                "mean_query_words": 3.0,
                "judged_per_query": 1.0,
                "relevant_per_query": 1.0,
                "share_with_answers": 0.0,
                "judged_but_missing": 0,
            },
            "test": {
                "queries": 2,
                "mean_query_words": 3.5,
                "judged_per_query": 2.0,
                "relevant_per_query": 1.5,
                "share_with_answers": 0.5,
                "judged_but_missing": 1,
            },
        },
    }


@pytest.mark.collections
def test_info_of_a_real_collection(shared):
    splits = info(BeirCollection(shared("cacm")))["splits"]
    assert splits["test"]["queries"] == 52
    assert splits["test"]["relevant_per_query"] > 5
