"""What a study says of given values, and what it writes."""

import dataclasses
import json
import re
import xml.etree.ElementTree as ET

import matplotlib.image
import numpy as np
import pytest

from qpeft.adapters._lora_targets import Place
from qpeft.analysis.ablation import ALL, NONE, of_layers
from qpeft.analysis.study import Study, Subject, bases, findings
from qpeft.analysis.study_designs import checkpoints, components, layers, losses, projections, ranks
from qpeft.analysis.study_figures import _around, _heat_maps
from qpeft.analysis.study_intervals import draws, interval, ratio_interval
from qpeft.analysis.study_report import sentences, summary, write_study
from qpeft.errors import OptionError
from qpeft.evaluation.significance import bootstrap_interval

QUERIES = 40


def subject(name, *, rank=2, seed=1, step=None, names=("q", "up"), depth=3, **more):
    places = {
        Place(layer, each, "mlp" if each == "up" else "attention"): rank * (10 if each == "q" else 30)
        for layer in range(depth)
        for each in names
    }
    return Subject(name, name * 8, rank, seed, places, step, **more)


def worth(index, active):
    """Return a made-up value per query: upper layers and MLPs matter more, seeds differ a little."""
    rng = np.random.default_rng(7)
    ease = rng.uniform(0.1, 0.5, QUERIES)
    help_of = rng.uniform(0, 0.1, (3, QUERIES))
    gain = sum(
        ((2 if p.component == "mlp" else 1) * (p.layer + 1) * help_of[p.layer] for p in active), np.zeros(QUERIES)
    )
    return ease + gain / 3 + 0.001 * index


def measured(design, subjects):
    values = {(i, active): worth(i, active) for i in range(len(subjects)) for active in design.sets(i)}
    return values, findings(design, subjects, values)


def study(design, subjects, **changes):
    _, found = measured(design, subjects)
    made = {
        "study": design.study,
        "measure": "nDCG@10",
        "collection": "toy · test",
        "depth": 20,
        "queries": tuple(f"q{i}" for i in range(QUERIES)),
        "subjects": tuple(
            {"folder": s.folder, "sha256": s.sha256, "rank": s.rank, "method": s.method, "seed": s.seed, "step": s.step,
             "component": s.component, "parameters": s.parameters} for s in subjects
        ),
        "findings": found,
        "full": design.full.ablation.name,
        "work": {"layers_run": 12, "layers_without_sharing": 20, "why_not": ""},
        "made": {"command": f"analyze {design.study}", "options": {"seed": 0}},
    }  # fmt: skip
    return Study(**(made | changes))


def designs():
    """Return a design of each study with its adapters."""
    seeds = [subject("a"), subject("b", seed=2)]
    trained = [
        *seeds,
        subject("c", names=("q",)),
        subject("d", names=("up",), rank=2),
        subject("e", names=("q",), rank=6),
    ]
    ranked = [subject(f"r{rank}{seed}", rank=rank, seed=seed) for rank in (8, 1, 2) for seed in (1, 2)]
    stepped = [subject(f"s{step}{seed}", step=step, seed=seed) for seed in (1, 2) for step in (0, 50, 100)]
    taught = [subject(f"{loss}{seed}", loss=loss, seed=seed) for loss in ("softmax", "sft") for seed in (1, 2)]
    return {
        "layers": (layers(seeds, 2), seeds),
        "projections": (projections(seeds, True), seeds),
        "components": (components(trained), trained),
        "ranks": (ranks(ranked), ranked),
        "checkpoints": (checkpoints(stepped), stepped),
        "losses": (losses(taught), taught),
    }


NAMES = ["layers", "projections", "components", "ranks", "checkpoints", "losses"]


@pytest.mark.parametrize("name", NAMES)
def test_findings_are_the_formulas(name):
    design, subjects = designs()[name]
    values, found = measured(design, subjects)
    full = next(each for each in found if each.name == design.full.ablation.name)
    of_full = np.mean([values[i, design.full.ablation.active] for i in design.full.adapters], axis=0)
    none = np.mean([values[i, frozenset()] for i in design.full.adapters], axis=0)
    seeds = [[subjects[i].seed for i in line.adapters] for line in design.lines]
    drawn = dict(
        zip(
            (each.name for each in found),
            draws(np.array([each.per_query for each in found]), list(map(by_seed, seeds, found))),
            strict=True,
        )
    )
    for line, each in zip(design.lines, found, strict=True):
        own = np.mean([values[i, line.ablation.active] for i in line.adapters], axis=0)
        assert each.mean == pytest.approx(own.mean())
        assert each.means == pytest.approx([values[i, line.ablation.active].mean() for i in line.adapters])
        assert (each.drop, each.gain) == pytest.approx(((of_full - own).mean(), (own - none).mean()))
        assert each.share == pytest.approx(own.mean() / of_full.mean())
        assert each.recovered == pytest.approx((own - none).mean() / (of_full - none).mean())
        assert each.per_query == pytest.approx(own, abs=1e-6)
        ours, gained = drawn[each.name], drawn[each.name] - drawn[NONE]
        assert each.drop_interval == pytest.approx(interval(drawn[full.name] - ours))
        assert each.gain_interval == pytest.approx(interval(gained))
        assert each.share_interval == pytest.approx(interval(ours / drawn[full.name]))
        assert each.recovered_interval == pytest.approx(interval(gained / (drawn[full.name] - drawn[NONE])))
        counted = subjects[line.adapters[0]].places
        assert each.parameters == sum(counted[place] for place in line.ablation.active)
    assert (full.drop, full.share, full.recovered) == pytest.approx((0, 1, 1))


def by_seed(seeds, found):
    return dict(zip(seeds, found.means, strict=True))


def lines_of(values):
    """Return means over seeds and over queries of `[lines, seeds, queries]`."""
    return values.mean(1), [dict(enumerate(line.mean(1))) for line in values]


def test_draws_vary_as_queries_and_seeds_do():
    """The variance of a mean over both: of queries over n, and of seeds, estimated without bias, over S; 5 %."""
    rng = np.random.default_rng(3)
    values = rng.normal(0, 0.3, (1, 1, 200)) + rng.normal(0, 0.05, (1, 3, 1)) + rng.normal(0, 0.1, (1, 3, 200))
    (drawn,) = draws(*lines_of(values))
    expected = values.mean(1).var() / 200 + values.mean(2).var(ddof=1) / 3
    assert drawn.mean() == pytest.approx(values.mean(), abs=4 * expected**0.5 / 100)
    assert drawn.var() == pytest.approx(expected, rel=0.05)
    assert drawn.var() > 1.5 * values.mean(1).var() / 200, "queries alone would vary less"
    (alone,) = draws(*lines_of(values[:, :1]))
    assert interval(alone) == pytest.approx(bootstrap_interval(values[0, 0]), abs=2e-3), "one seed does not vary"


def test_draws_are_paired_in_queries_and_in_seeds():
    rng = np.random.default_rng(4)
    values = rng.normal(0, 0.3, (1, 3, 200)) + rng.normal(0, 0.1, (1, 3, 1))
    per_query, seeds = lines_of(np.concatenate([values, values + 0.1, values + 0.1]))
    apart = [seeds[0], dict(reversed(seeds[1].items())), {f"other {name}": mean for name, mean in seeds[2].items()}]
    one, paired, unpaired = draws(per_query, apart)
    assert interval(paired - one) == pytest.approx((0.1, 0.1))
    assert (unpaired - one).var() == pytest.approx(2 * values.mean(2).var(ddof=1) / 3, rel=0.1)
    assert np.array_equal(draws(per_query[1:], apart[1:])[0], paired), "whatever else is drawn"


def test_ratios_of_what_may_be_zero():
    rng = np.random.default_rng(5)
    assert ratio_interval(rng.normal(1, 0.1, 1000), rng.normal(0.1, 0.1, 1000)) is None
    low, high = ratio_interval(rng.normal(1, 0.1, 1000), rng.normal(2, 0.01, 1000))
    assert 0.35 < low < 0.5 < high < 0.65


def test_what_follows_can_be_taken_from_the_lines_again():
    made = study(*designs()["components"])
    stale = dataclasses.replace(
        made, findings=tuple(dataclasses.replace(each, gain=9.0, gain_interval=(8, 9)) for each in made.findings)
    )
    assert stale.compared_again() == made == made.compared_again()
    one, other = "trained: mlp, rank 2", "trained: attention, rank 6"
    found, bounds = made.difference(one, other)
    assert found == pytest.approx(made.find(one).mean - made.find(other).mean)
    assert bounds[0] < found < bounds[1]
    assert made.difference(one, "trained: attention, rank 7") is None


def test_lines_are_paired_by_seed_where_it_is_known():
    made = study(*designs()["components"])
    lines = [
        dataclasses.replace(each, adapters=adapters, means=(each.mean - 0.1, each.mean + 0.1))
        for each, adapters in zip(made.findings[:2], [(0, 1), (2, 3)], strict=True)
    ]

    def width(*seeds):
        subjects = tuple({"seed": seed} for seed in seeds)
        found = dataclasses.replace(made, findings=tuple(lines), subjects=subjects)
        low, high = found.difference(*(each.name for each in lines))[1]
        return high - low

    narrow = width(1, 2, 1, 2)
    assert width(1, 2, 3, 4) > 2 * narrow
    assert width(None, None, None, None) > 2 * narrow
    assert width(1, 1, 1, 1) > 2 * narrow, "two trainings with one seed are two"


def test_each_study_has_its_lines():
    found = {name: [line.ablation.name for line in design.lines] for name, (design, _) in designs().items()}
    places = list(designs()["layers"][1][0].places)
    assert found["layers"] == [ALL, *(each.name for each in of_layers(places, 2)), NONE]
    assert {"without q", "up", "q of layer 3", "without up of layer 1"} <= set(found["projections"])
    assert found["components"] == [
        "trained: both, rank 2", "trained: attention, rank 2", "trained: attention, rank 6", "trained: mlp, rank 2",
        "attention of both", "mlp of both", NONE,
    ]  # fmt: skip
    assert found["ranks"] == ["rank 1", "rank 2", "rank 8", NONE]
    assert found["checkpoints"] == ["step 0", "step 50", "step 100", NONE]
    assert found["losses"] == ["loss sft", "loss softmax", NONE]
    assert designs()["losses"][0].full.ablation.name == "loss softmax", "that of the adapter given first"
    adapters = {line.ablation.name: line.adapters for line in designs()["components"][0].lines}
    assert adapters["trained: both, rank 2"] == adapters["mlp of both"] == (0, 1)
    assert adapters["trained: attention, rank 6"] == (4,)


def test_what_is_needed_of_an_adapter():
    design, subjects = designs()["components"]
    both, attention = subjects[0].places, subjects[2].places
    assert design.sets(2) == [frozenset(attention)], "M(0) is that of the adapters with both"
    by_component = [frozenset(p for p in both if p.component == c) for c in ("attention", "mlp")]
    assert design.sets(0) == [frozenset(both), *by_component, frozenset()]
    design, _ = designs()["layers"]
    assert len(design.sets(0)) == len(set(design.sets(0))) < len(design.lines), "the lowest one is layer 1 alone"


def test_adapters_that_are_the_same_without_additions():
    ranked = {"a": 1, "b": 2, "c": 2, "d": 2, "e": 2}
    made = [subject(name, rank=rank, prompt="x", only_additions=True) for name, rank in ranked.items()]
    assert bases(ranks(made), made) == {1: 1, 2: 1, 3: 1, 4: 1}, "of those that M(0) is taken of"
    made = [dataclasses.replace(each, only_additions=each.folder in "bd") for each in made]
    assert bases(ranks(made), made) == {1: 1, 2: 2, 3: 1, 4: 4}


def test_a_gain_within_chance_has_no_shares():
    design, subjects = designs()["layers"]
    values = {
        key: worth(0, frozenset()) + (0.01 if key[1] else 0.0) * np.tile([1, -1], QUERIES // 2)
        for key in measured(design, subjects)[0]
    }
    found = findings(design, subjects, values)
    assert all(each.recovered_interval is None for each in found)
    text = "\n".join(sentences(study(design, subjects, findings=found)))
    assert "within chance, so shares of it say nothing" in text
    assert "%" not in text
    assert "Without one layer, none of 3 drops is clear of chance; the largest is without layer" in text
    assert "One layer alone, none of 3 gains is clear of chance; the largest is of layer" in text


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: layers([subject("a"), subject("b", names=("q",))], 1), "b has additions at other places than a"),
        (
            lambda: layers([subject("a"), subject("b", rank=4)], 1),
            "b has another rank than a: they are not seeds of one",
        ),
        (lambda: projections([subject("a"), subject("b", rank=4)], False), "b has another rank than a"),
        (
            lambda: layers([subject("a", scales=(2.0,)), subject("b", scales=(4.0,))], 1),
            "b has another scale (alpha / rank) than a",
        ),
        (lambda: layers([subject("a"), subject("b", method="yes_no")], 1), "b has another method than a"),
        (
            lambda: layers([subject("a", prompt="x"), subject("b", prompt="y")], 1),
            "b has another template, answers or passage length than a",
        ),
        (lambda: layers([subject("a", loss="both"), subject("b", loss="pair")], 1), "b has another loss than a"),
        (
            lambda: layers([subject("a"), dataclasses.replace(subject("a"), folder="copy")], 1),
            "copy has the weights of a; give each adapter once",
        ),
        (lambda: ranks([subject("a"), subject("b", rank=4), subject("b", rank=4)]), "b has the weights of b"),
        (lambda: ranks([subject("a"), subject("b", rank=4, prompt="y")]), "b has another template"),
        (
            lambda: ranks([subject("a"), subject("b", rank=4, method="yes_no")]),
            "b has another method than a: they are not",
        ),
        (lambda: components([subject("a"), subject("b", names=("q",), prompt="y")]), "b has another template"),
        (
            lambda: components(
                [subject("a"), subject("b", names=("q",), scales=(1,)), subject("c", names=("q",), scales=(2,))]
            ),
            "c has another scale (alpha / rank) than b: they are not seeds of one training",
        ),
        (lambda: checkpoints([subject("a", step=0), subject("b", step=5, rank=4)]), "b has another rank than a"),
        (lambda: losses([subject("a", loss="sft"), subject("b")]), "losses: b does not say with which loss"),
        (lambda: losses([subject("a", loss="sft"), subject("b", loss="sft")]), "all adapters were trained with sft"),
        (lambda: losses([subject("a", loss="sft"), subject("b", loss="pair", rank=4)]), "b has another rank than a"),
        (lambda: layers([subject("a")], 3), "--window is 3; the adapter has additions in 3 layers"),
        (lambda: projections([subject("a"), subject("b", depth=2)], False), "b has additions at other places"),
        (
            lambda: components([subject("a", names=("q",))]),
            "trained with both components, all of one rank; ranks: none",
        ),
        (lambda: components([subject("a"), subject("b", rank=4)]), "all of one rank; ranks: 2, 4"),
        (lambda: ranks([subject("a"), subject("b", seed=2)]), "all adapters have rank 2"),
        (lambda: ranks([subject("a"), subject("b", rank=4, depth=2)]), "b has additions at other places"),
        (lambda: checkpoints([subject("a", step=0)]), "folders with the states of several steps"),
        (
            lambda: checkpoints([subject("a", step=0), subject("b", step=5), subject("c", step=0)]),
            "step 5 is not there for every adapter",
        ),
    ],
)
def test_adapters_that_cannot_be_compared(make, message):
    with pytest.raises(OptionError, match=re.escape(message)):
        make()


FIGURES = {
    "layers": {"layers", "windows", "cumulative"},
    "projections": {"projections", "grid"},
    "components": {"components"},
    "ranks": {"ranks"},
    "checkpoints": {"checkpoints"},
    "losses": {"losses"},
}


@pytest.mark.parametrize("name", NAMES)
def test_the_folder(name, tmp_path):
    made = study(*designs()[name])
    write_study(made, tmp_path)
    figures = {f"{figure}.{kind}" for figure in FIGURES[name] for kind in ("png", "svg")}
    assert {path.name for path in tmp_path.iterdir()} == figures | {"study.json", "summary.md", "report.html"}
    read = Study.from_dict(json.loads((tmp_path / "study.json").read_text()))
    assert read == made
    assert summary(read) == (tmp_path / "summary.md").read_text()
    for figure in FIGURES[name]:
        assert matplotlib.image.imread(tmp_path / f"{figure}.png").std() > 0.01
        ET.fromstring((tmp_path / f"{figure}.svg").read_text())
    html = (tmp_path / "report.html").read_text()
    assert html.count("<svg") == len(FIGURES[name])
    assert not re.search(r"(?:src|href)=\"(?!#)", html), "nothing is fetched"
    for each in made.findings:
        assert each.name in html
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))


def test_a_name_does_not_end_its_column():
    made = study(*designs()["layers"])
    made = dataclasses.replace(made, findings=(dataclasses.replace(made.findings[0], name="a|b"), *made.findings[1:]))
    assert r"a\|b" in summary(made)
    assert "| a|b" not in summary(made)


@pytest.mark.parametrize("name", NAMES)
def test_numbers_in_the_summary_are_those_of_the_findings(name):
    made = study(*designs()[name])
    text = summary(made)
    full = made.find(made.full)
    assert f"{full.mean:.3f}" in text.splitlines()[4]
    for each in made.findings:
        (row,) = (line for line in text.splitlines() if line.startswith(f"| {each.kind} | {each.name} |"))
        cells = [cell.strip() for cell in row.split("|")]
        assert cells[3] == f"{each.parameters:,}"
        assert cells[4].startswith(f"{each.mean:.4f}")
        assert ("±" in cells[4]) == (len(each.adapters) > 1)
        assert cells[5].replace("−", "-").startswith(f"{each.drop:+.3f}")
        assert cells[6].replace("−", "-").startswith(f"{each.gain:+.3f}")
    assert "12 layer runs instead of 20" in text


def test_words_name_the_extremes():
    made = study(*designs()["layers"])
    text = "\n".join(sentences(made))
    worst = max(made.of("all but one layer"), key=lambda each: each.drop)
    assert worst.name == "without layer 3"
    assert f"most is lost {worst.name}: a drop of +{worst.drop:.3f}" in text
    assert "One layer alone, most is gained with layer 3: +" in text
    assert "3 of 3 drops are clear of chance (without layer 1, without layer 2, without layer 3)" in text
    made = study(*designs()["projections"])
    text = "\n".join(sentences(made))
    assert "One projection alone, most is gained with up: +" in text
    assert "By its parameters, q alone gains most" in text, "half the gain with a third of the parameters"
    text = "\n".join(sentences(study(*designs()["components"])))
    assert "Trained: mlp, rank 2 (180 parameters)" in text
    assert re.search(r"Mlp of both .*: 0\.\d+, \d+ % \[\d+ … \d+\] of the measure with both, and \d+ %", text)


def test_how_many_layers_suffice():
    design, subjects = designs()["layers"]
    values = measured(design, subjects)[0]
    upper = {key: worth(key[0], {place for place in key[1] if place.layer > 0}) for key in values}
    text = "\n".join(sentences(study(design, subjects, findings=findings(design, subjects, upper))))
    assert "Alone, the highest 2 layers are not clearly worse than all: 0." in text
    assert "lowest" not in text
    top = {key: worth(key[0], {place for place in key[1] if place.layer == 2}) for key in values}
    text = "\n".join(sentences(study(design, subjects, findings=findings(design, subjects, top))))
    assert "Alone, the highest layer is not clearly worse than all: 0." in text


def test_a_rank_that_is_better_than_the_highest_is_not_called_within_chance():
    design, subjects = designs()["ranks"]
    values = measured(design, subjects)[0]
    higher = {key: value + 0.3 * bool(key[1] and subjects[key[0]].rank == 1) for key, value in values.items()}
    text = "\n".join(sentences(study(design, subjects, findings=findings(design, subjects, higher))))
    assert re.search(r"Clear of chance, better than rank 8: rank 1 \(a drop of −0\.\d+ \[−", text)
    assert "rank 1 on" not in text


def test_where_nothing_was_shared_the_reason_is_told():
    work = {"layers_run": 0, "layers_without_sharing": 0, "why_not": "shared states change scores"}
    made = study(*designs()["ranks"], work=work)
    assert list(sentences(made))[-1] == "Nothing was shared: shared states change scores."
    made = study(*designs()["ranks"], work=work | {"layers_run": 12, "layers_without_sharing": 20})
    assert [words[:40] for words in sentences(made)][-2:] == [
        "States that ablations have in common wer",
        "For some queries nothing was shared: sha",
    ]


def test_one_query_has_no_intervals():
    design, subjects = designs()["layers"]
    values = {key: value[:1] for key, value in measured(design, subjects)[0].items()}
    found = findings(design, subjects, values)
    assert all(each.drop_interval is None and each.gain_interval is None for each in found)
    made = study(design, subjects, findings=found, queries=("q0",))
    assert "[" not in summary(dataclasses.replace(made, findings=found)).replace("[in", "")


def test_bands_are_as_wide_as_the_interval_of_the_difference():
    made = study(*designs()["layers"])
    for each in made.of("all but one layer"):
        low, high = _around(each, "full")
        full = made.find(ALL).mean
        assert (full - high, full - low) == pytest.approx(each.drop_interval)
        assert low < each.mean < high
    for each in made.of("one layer alone"):
        low, high = _around(each, "none")
        none = made.find(NONE).mean
        assert (low - none, high - none) == pytest.approx(each.gain_interval)


def test_cells_of_the_heat_maps_stand_at_their_layer_and_projection():
    made = study(*designs()["projections"])
    alone, without = _heat_maps(made).axes
    for axes, kind in ((alone, "grid, one alone"), (without, "grid, all but one")):
        shown = {(round(text.get_position()[0]), round(text.get_position()[1])): text.get_text() for text in axes.texts}
        columns = [label.get_text() for label in axes.get_xticklabels()]
        for each in made.of(kind):
            value = each.gain if kind == "grid, one alone" else each.drop
            assert shown[columns.index(each.projection), each.x - 1].startswith(f"{value:+.3f}")
        colours = axes.collections[0].get_array().reshape(3, 2)
        assert colours[2, 1] == max(each.gain if axes is alone else each.drop for each in made.of(kind))
