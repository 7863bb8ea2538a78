"""Which rows a step has, and what dev is ranked by."""

import dataclasses

import pytest

from qpeft.training.config import TrainingConfig
from qpeft.training.contexts import contexts_bytes
from qpeft.training.dev import DevRanking
from qpeft.training.groups import in_batch_negatives
from qpeft.training.trainer import Collator, TrainingSet
from qpeft.types import Candidates, Group, Passage, Query
from tiny_adapters import build, with_store
from tiny_training import ASKED, FAST, GROUPS, PASSAGES, batch_for, dev_for, prompt_for, scorer_for


@pytest.fixture
def lm(make_lm):
    return with_store(make_lm("llama"))


def test_a_teachers_scores_stand_at_their_passages(lm):
    adapter = build("soft_prompt", lm)
    teacher = {("sky", "sky"): 3.0, ("sky", "sea"): 2.0, ("sea", "sea"): -7.0}
    config = TrainingConfig(**(FAST | {"negatives": 5, "loss": "margin_mse"}))
    groups = [GROUPS[0], dataclasses.replace(GROUPS[1], negatives=())]
    batch = Collator(scorer_for(lm, adapter), config, 0, teacher)([(0, group) for group in groups])["batch"]
    assert sorted(batch.teacher[0].tolist(), reverse=True) == [3.0, 2.0, -7.0, -7.0, -7.0, -7.0]
    assert batch.teacher[0, 0] == 3.0
    assert batch.teacher[1, 0] == -7.0
    assert batch.mask.sum(1).tolist() == [6, 1]


def by_seed(seed):
    return TrainingSet(GROUPS, 5, seed=seed)


def test_every_epoch_has_every_query_once_in_another_order():
    data = TrainingSet(GROUPS, 5, seed=3)
    orders = []
    for epoch in range(5):
        items = [data[epoch * 4 + place] for place in range(4)]
        assert {e for e, _ in items} == {epoch}
        orders.append([group.query.id for _, group in items])
        assert sorted(orders[-1]) == sorted(ASKED)
    assert len(set(map(tuple, orders))) > 2
    assert len({tuple(data[place][1].query.id for place in range(4)) for data in map(by_seed, range(9))}) > 2
    again = TrainingSet(GROUPS, 5, seed=3)
    assert [again[13][1], again[2][1]] == [data[13][1], data[2][1]]


def test_negatives_change_with_the_epoch_and_the_seed(lm):
    adapter = build("soft_prompt", lm)
    config = TrainingConfig(negatives=2)

    def rows(epoch, seed):
        return tuple(Collator(scorer_for(lm, adapter), config, seed)([(epoch, GROUPS[0])])["batch"].rows)

    assert rows(1, 0) == rows(1, 0)
    assert len({rows(epoch, 0) for epoch in range(8)}) > 3
    assert len({rows(0, seed) for seed in range(8)}) > 3
    assert len({rows(epoch, 0)[0] for epoch in range(8)}) == 1, "the positive stays"


def test_other_queries_positives_are_negatives_too(lm):
    adapter = build("soft_prompt", lm)
    batch, _ = batch_for(lm, adapter, negatives=0, in_batch=True)
    assert batch.mask.tolist() == [[True] * 4] * 4
    alone, _ = batch_for(lm, adapter, negatives=0)
    for own, positive in enumerate(alone.rows):
        rows = batch.rows[4 * own : 4 * own + 4]
        assert rows[0] == positive
        assert {row.query for row in rows} == {positive.query}
        assert {row.context for row in rows} == {row.context for row in alone.rows}


def test_other_queries_negatives_are_negatives_too(lm):
    adapter = build("soft_prompt", lm)
    batch, _ = batch_for(lm, adapter, negatives=1, in_batch=True)
    alone, _ = batch_for(lm, adapter, negatives=1)
    drawn = {row.context for row in alone.rows}
    assert len(drawn) > len(alone.mask), "positives and negatives"
    width, start = batch.mask.shape[1], 0
    for own in batch.mask.sum(1).tolist():
        assert {row.context for row in batch.rows[start : start + own]} == drawn
        start += own
    assert width == len(drawn)


def ids(passages):
    return [passage.id for passage in passages]


def test_lines_of_one_query_are_no_negatives_of_each_other(lm):
    one, two, three = (Passage(name, name) for name in ("the sky", "the sea", "the king"))
    groups = [Group(Query("a", "why"), (one,)), Group(Query("b", "why"), (two,)), Group(Query("c", "who"), (three,))]
    config = TrainingConfig(negatives=0, in_batch=True)
    scorer = scorer_for(lm, build("soft_prompt", lm))
    batch = Collator(scorer, config, 0)([(0, group) for group in groups])["batch"]
    assert batch.mask.sum(1).tolist() == [2, 2, 3]


def test_in_batch_negatives():
    own = Passage("own", "the blue sky"), Passage("second", "the  red\nsky")
    drawn = (own[0], Passage("drawn", "the sea"))
    group = Group(Query("q", "why", ("three", "Old King")), own, drawn[1:])
    others = [
        own[0],
        Passage("own", "another text under the same id"),
        Passage("copy", "the blue  sky"),
        own[1],
        Passage("second copy", "the red sky"),
        drawn[1],
        Passage("drawn copy", "the sea", "title"),
        Passage("good", "the moon"),
        Passage("good", "the moon"),
        Passage("good copy", "the\nmoon"),
        Passage("answer", "an octopus has three heart"),
        Passage("answer too", "the old king."),
        Passage("no answer", "the oldest king", "three"),
        Passage("title", "", "Sea"),
        Passage("other title", "", "Lake"),
        Passage("title copy", " ", "Sea"),
        Passage("empty", " "),
    ]
    assert ids(in_batch_negatives(group, drawn, others)) == ["good", "no answer", "title", "other title"]
    titled = Group(Query("q", "why"), (Passage("p", "", "Sea"),))
    assert ids(in_batch_negatives(titled, titled.positives, others[-4:])) == ["other title"]


def test_a_positive_of_two_other_queries_is_a_negative_once(lm):
    adapter = build("soft_prompt", lm)
    shared = [Group(Query(str(i), "the tide"), (PASSAGES["sea"],)) for i in range(2)]
    config = TrainingConfig(negatives=0, in_batch=True)
    batch = Collator(scorer_for(lm, adapter), config, 0)([(0, group) for group in (*shared, GROUPS[0])])["batch"]
    assert batch.mask.sum(1).tolist() == [2, 2, 2]


def test_hints_of_other_queries(lm):
    adapter = build("qpeft_a", lm)
    read = {"sky": GROUPS[3].query}
    own, config = scorer_for(lm, adapter), TrainingConfig(negatives=1)
    other = own.with_hint_queries(read)
    batch = Collator(other, config, 0)([(0, GROUPS[0]), (0, GROUPS[1])])["batch"]
    plain, _ = batch_for(lm, adapter, negatives=1)
    assert batch.rows[0].query == plain.rows[6].query
    assert batch.rows[0].target == plain.rows[0].target
    assert batch.rows[2].query == plain.rows[2].query
    changed, same = (dev_for(scorer).rank(adapter) for scorer in (other, own))
    assert changed["sky"] != same["sky"]
    assert changed["sea"] == same["sea"]


def test_dev_ranks_what_cannot_be_read_last(lm):
    adapter = build("qpeft_a", lm)
    passages = (Passage("a", " "), Passage("b", "the sky"), Passage("c", ""), Passage("d", "sea"))
    dev = DevRanking(scorer_for(lm, adapter), [Candidates(GROUPS[0].query, passages)], {"sky": {"a": 1}}, "RR@10")
    for who in (None, adapter):
        hits = dev.rank(who)["sky"].hits
        assert [hit.passage_id for hit in hits][2:] == ["c", "a"]
    assert dev.measure(adapter) == {"RR@10": 0.25}


def test_dev_counts_the_queries_that_are_ranked(lm):
    """Judgements may be of more."""
    adapter = build("soft_prompt", lm)
    item = Candidates(GROUPS[0].query, (PASSAGES["sky"],))
    dev = DevRanking(scorer_for(lm, adapter), [item], {"sky": {"sky": 1}, "sea": {"sea": 1}}, "RR@10")
    assert dev.measure(adapter) == {"RR@10": 1.0}


@pytest.mark.parametrize(("negatives", "epochs", "contexts"), [(1, 1, 2), (1, 3, 4), (2, 1, 3), (9, 9, 6), (0, 5, 1)])
def test_what_contexts_take_is_told_beforehand(lm, negatives, epochs, contexts):
    adapter = build("soft_prompt", lm)
    config = TrainingConfig(negatives=negatives, epochs=epochs)
    prompt, group = prompt_for(lm, adapter), GROUPS[0]
    passages = (*group.positives, *group.negatives)
    rows = [prompt.rows(group.query, passage)[0] for passage in passages]
    lm.encode_all([row.context[: row.hint] for row in rows])
    each = lm.store.bytes_kept / len(passages)
    dev = [Candidates(group.query, passages)]  # which are known
    assert contexts_bytes(lm, prompt, [group], config, dev) == pytest.approx(contexts * each, abs=1)
    dev += [Candidates(group.query, (Passage("other", "the moon"), Passage("another", "a lion")))]
    assert contexts_bytes(lm, prompt, [group], config, dev) == pytest.approx((contexts + 2) * each, abs=1)
