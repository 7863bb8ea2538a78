import itertools
import statistics

import pytest
import torch

from mini_candidates import mini_candidates
from qpeft import pointwise
from qpeft.errors import OptionError, QueryError, ScoreError
from qpeft.loading import load_lm
from qpeft.methods.query_likelihood import Config, build, build_scorer
from qpeft.model_config import ModelConfig
from qpeft.pointwise import Pointwise
from qpeft.template import Prompt, load_template
from qpeft.types import UNREADABLE, Candidates, Passage, Query
from reference import naive_log_probs

QUERY = Query("q", "why is the sky blue?")
PASSAGE = Passage("p", "the light of the moon and the old red king of the salty sea")


def score(lm, passage=PASSAGE, **options):
    return build_scorer(Config(**options), lm).score([(QUERY, passage)])[0]


@pytest.fixture(scope="module")
def lm(make_lm):
    return make_lm("qwen3")


def test_mean_and_sum_equal_the_reference(lm):
    row = Prompt(load_template("plain"), lm.tokenizer, 128).rows(QUERY, PASSAGE)[0]
    target, passage = naive_log_probs(lm.model, row)
    assert score(lm) == pytest.approx(sum(target) / len(target), abs=1e-4)
    assert score(lm, normalize="sum") == pytest.approx(sum(target), abs=1e-3)
    prior = sum(passage) / len(passage)
    assert score(lm, document_prior=0.25) == pytest.approx(sum(target) / len(target) + 0.25 * prior, abs=1e-4)


@pytest.mark.parametrize("pool", ["max", "mean"])
def test_windows_equal_scoring_each_alone(lm, pool):
    prompt = Prompt(load_template("plain"), lm.tokenizer, 128)
    rows = prompt.rows(QUERY, PASSAGE, windows=6, overlap=2)
    assert len(rows) > 2
    each = [sum(target) / len(target) for target, _ in (naive_log_probs(lm.model, row) for row in rows)]
    expected = max(each) if pool == "max" else sum(each) / len(each)
    assert score(lm, windows=6, window_overlap=2, window_pool=pool) == pytest.approx(expected, abs=1e-4)


def test_unreadable_passages_come_last_one_below_the_lowest(lm):
    passages = (Passage("none", "  "), Passage("a", "the sky"), Passage("b", "sea"))
    reranker = build(Config(), lm)
    (ranking,) = reranker.rerank([Candidates(QUERY, passages)])
    assert ranking.hits[-1].passage_id == "none"
    assert ranking.hits[-1].score == pytest.approx(ranking.hits[-2].score - 1)
    assert reranker.counts.empty_passages == 1


def test_what_has_no_tokens_gets_one_score_in_any_company(make_lm):
    """Zero-width characters are no white space, and tokenizers like BERT's remove them."""
    reranker = build(Config(), make_lm("bert"))
    for text in ("", " ", "\u200b"):
        assert reranker.predict(("why", text)) == UNREADABLE
        assert reranker.predict([("why", text), ("why", "the sky")])[0] == UNREADABLE
        assert reranker.rank("why", [text, "the sky"])[1] == {"corpus_id": 0, "score": UNREADABLE}


def test_counts(lm):
    reranker = build(Config(max_passage_tokens=3), lm)
    passages = (Passage("a", "the sky is blue"), Passage("b", "sea"), Passage("c", ""))
    list(reranker.rerank([Candidates(QUERY, passages), Candidates(Query("r", "who"), passages[:1])]))
    assert reranker.counts.pairs == 4
    assert reranker.counts.truncated_passages == 2
    assert reranker.counts.empty_passages == 1
    assert reranker.counts.constant_queries == 0
    prompt = Prompt(load_template("plain"), lm.tokenizer, 128, max_passage_tokens=3)
    pairs = [(QUERY, passages[0]), (QUERY, passages[1]), (Query("r", "who"), passages[0])]
    assert reranker.counts.tokens == sum(len(prompt.rows(*pair)[0]) for pair in pairs)


def test_constant_scores_are_counted(lm):
    reranker = build(Config(), lm)
    (ranking,) = reranker.rerank([Candidates(QUERY, (Passage("a", "the sky"), Passage("b", "the sky")))])
    assert ranking.constant
    assert reranker.counts.constant_queries == 1


def test_a_model_that_says_nan_is_stopped(make_lm):
    lm = make_lm("llama")
    with torch.no_grad():
        next(iter(lm.model.parameters())).fill_(float("nan"))
    with pytest.raises(ScoreError, match=r"query 'q', passage 'p'.*nan"):
        list(build(Config(), lm).rerank([Candidates(QUERY, (PASSAGE,))]))


@pytest.mark.parametrize("pool", ["max", "mean"])
def test_no_window_hides_a_nan(make_lm, pool):
    lm = make_lm("llama")
    with torch.no_grad():
        lm.model.get_input_embeddings().weight[lm.tokenizer.convert_tokens_to_ids("sea")] = float("nan")
    options = {"windows": 5, "window_overlap": 1, "window_pool": pool}
    without = Passage("p", PASSAGE.text.removesuffix("sea"))
    assert score(lm, without, **options) < 0
    with pytest.raises(ScoreError, match=r"query 'q', passage 'p'.*nan"):
        list(build(Config(**options), lm).rerank([Candidates(QUERY, (PASSAGE,))]))


def test_check_finds_what_ranking_would_end_in(make_lm):
    small = make_lm("llama", max_length=16)
    build(Config(), small).check(QUERY)
    with pytest.raises(QueryError, match="'long'"):
        build(Config(), small).check(Query("long", "why " * 16))
    with pytest.raises(OptionError, match=r"query 'q': windows of \d tokens cannot overlap by 8"):
        build(Config(windows=9, window_overlap=8), small).check(QUERY)


@pytest.mark.parametrize(
    "options", [{"max_passage_tokens": 0}, {"windows": 9, "window_overlap": -1}, {"queries_per_batch": 0}]
)
def test_numbers_that_make_no_sense(lm, options):
    with pytest.raises(OptionError, match=f"--{list(options)[-1].replace('_', '-')} is .* at least"):
        build(Config(**options), lm)


def test_contradicting_options(lm, t5):
    with pytest.raises(OptionError, match="--window-overlap 8"):
        build(Config(windows=8, window_overlap=8), lm)
    with pytest.raises(OptionError, match="decoder-only"):
        build(Config(document_prior=0.1), t5)


def test_encoder_decoders_rank_too(t5):
    reranker = build(Config(template="upr"), t5)
    (ranking,) = reranker.rerank([Candidates(QUERY, (Passage("a", "the sky"), PASSAGE))])
    assert len(ranking.hits) == 2
    assert not ranking.constant


def test_many_candidates_are_scored_some_at_a_time(lm, monkeypatch):
    texts = ["the sky", "a lion", "the salty sea", "the king", "why"]
    passages = tuple(Passage(str(i), text) for i, text in enumerate(texts))
    items = [Candidates(Query(str(i), text), passages) for i, text in enumerate(["why is the sky blue?", "who"])]
    scorer = build_scorer(Config(), lm)
    expected = list(Pointwise(scorer).rerank(items))
    asked, own = [], scorer.score
    monkeypatch.setattr(pointwise, "AT_ONCE", 4)
    monkeypatch.setattr(scorer, "score", lambda pairs: asked.append(len(pairs)) or own(pairs))
    for ranking, reference in zip(Pointwise(scorer).rerank(items), expected, strict=True):
        assert [hit.passage_id for hit in ranking.hits] == [hit.passage_id for hit in reference.hits]
        assert [hit.score for hit in ranking.hits] == pytest.approx([hit.score for hit in reference.hits], abs=1e-4)
    assert asked == [4, 4, 2]


@pytest.fixture(scope="module")
def both_types():
    """The embedded model in float32 and in bfloat16."""
    return [load_lm(ModelConfig("tiny-lm", dtype=dtype)) for dtype in ("float32", "bfloat16")]


@pytest.mark.parametrize("adapter", [None, "tiny-lm-qpeft-a", "tiny-lm-qpeft-r"])
def test_in_bfloat16_only_near_scores_change_places(adapter, both_types):
    items = mini_candidates(8, 6)
    exact, rounded = [], []
    for lm, found in zip(both_types, (exact, rounded), strict=True):
        scorer = build_scorer(Config(adapter=adapter), lm)
        for item in items:
            found.append(scorer.score([(item.query, passage) for passage in item.passages]))
    of_query = [list(zip(one, other, strict=True)) for one, other in zip(exact, rounded, strict=True)]
    differences = [abs(a - b) for pairs in of_query for a, b in pairs]
    assert 0 < statistics.fmean(differences) < 0.01
    assert max(differences) < 0.05, "a plain loop in bfloat16 has up to 0.024"
    for pairs in of_query:
        for (a, b), (c, d) in itertools.permutations(pairs, 2):
            assert a < c + 0.02 or b > d, "passages whose scores are that far apart stay in order"


def test_a_passage_of_which_nothing_is_predicted_has_no_prior(make_lm, tmp_path):
    """Without BOS, its first token has nothing to be predicted from."""
    lm = make_lm("llama")
    lm.tokenizer.bos_token = None
    (tmp_path / "bare.yaml").write_text('name: bare\nversion: 1\ncontext: "{passage}"\ntarget: " {query}"\n')
    options = {"template": str(tmp_path / "bare.yaml")}
    assert score(lm, Passage("p", "sky"), **options, document_prior=0.5) == score(lm, Passage("p", "sky"), **options)
