"""The recipe of the Q-PEFT experiment: its cells keep their names, its tables show what is finished."""

import importlib
import itertools
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

import qpeft
from tiny_models import build_family

RECIPES = Path(__file__).parents[2] / "recipes"
RECIPE = RECIPES / "qpeft"
COLLECTIONS = Path(qpeft.__file__).parent / "collections"
pytestmark = pytest.mark.skipif(not RECIPE.exists(), reason="no recipes beside the tests")


@pytest.fixture
def module(monkeypatch):
    """Return a function that imports a module of a recipe; other recipes have modules of the same names."""
    own = {path.stem for folder in (RECIPE, RECIPES / "tiny-lm") for path in folder.glob("*.py")}

    def forget():
        for name in own:
            sys.modules.pop(name, None)

    def load(name, folder=RECIPE):
        monkeypatch.syspath_prepend(str(folder))
        return importlib.import_module(name)

    forget()
    yield load
    forget()


def names(cells):
    return {cell.name for group in cells.GROUPS.values() for cell in group()}


def test_finished_cells_keep_their_names(module):
    with tarfile.open(RECIPE / "results" / "cells.tar.gz") as archive:
        finished = {Path(name).stem for name in archive.getnames() if "-seed" in name}
    assert len(finished) > 30
    assert finished <= names(module("cells"))


def test_settings_of_the_authors_keep_their_names(module):
    # Their options are written out, so an option that comes later would change them.
    found = names(module("cells"))
    assert {
        "reddit-shift-320-qpeft_a-authors-seed1-2c43f690",
        "reddit-shift-320-qpeft_r-authors-seed1-bf654f02",
    } <= found


def test_every_cell_has_a_name_of_its_own(module):
    cells = module("cells")
    listed = [cell.name for group in cells.GROUPS.values() for cell in group()]
    assert len(listed) == len(set(listed))
    one = cells.Cell("row", "qpeft_a", "squad")
    others = [
        cells.Cell("row", "qpeft_a", "squad", **more)
        for more in ({"model": "other"}, {"negatives": "random"}, {"options": {"soft_length": 2}}, {"seed": 2})
    ]
    assert len({one.name, *(other.name for other in others)}) == 5


def test_every_training_has_three_seeds_and_the_first_comes_first(module):
    cells = module("cells")
    for name in ("main", "sizes", "lora", "transfer_homes", "negatives", "together", "models", "authors"):
        seeds = [cell.seed for cell in cells.GROUPS[name]()]
        assert seeds == sorted(seeds)
        assert set(seeds) == {1, 2, 3}
    random = [cell.options for cell in cells.main() if cell.row == "random_k" and cell.home == "squad"]
    assert len({json.dumps(options, sort_keys=True) for options in random}) == 3


def test_easy_negatives_are_any_passages(module):
    cells, bench = module("cells"), module("bench").Bench(COLLECTIONS, Path("unused"), {})
    drawn = {}
    for kind, seed in itertools.product(("bm25", "random"), (1, 2)):
        groups = bench.groups(cells.Cell("row", "qpeft_a", "mini", 10, seed, negatives=kind), 3)
        assert len(groups) == 10
        drawn[kind, seed] = {g.query.id: {p.id for p in g.negatives} for g in groups}
        assert not any({p.id for p in g.positives} & drawn[kind, seed][g.query.id] for g in groups)
    again = bench.groups(cells.Cell("row", "qpeft_a", "mini", 10, 1, negatives="random"), 3)
    assert {g.query.id: {p.id for p in g.negatives} for g in again} == drawn["random", 1]
    reached = {hit.passage_id for ranking in bench.any_passages("mini", 1).values() for hit in ranking.hits}
    assert len(reached) > 300, "of 345 passages"
    shared = [len(drawn["random", 1][q] & drawn["bm25", 1][q]) / len(drawn["random", 1][q]) for q in drawn["bm25", 1]]
    assert sum(shared) / len(shared) < 0.3


def test_a_model_without_a_folder_is_passed_over(module, tmp_path):
    bench = module("bench").Bench(COLLECTIONS, tmp_path, {"here": str(tmp_path), "gone": str(tmp_path / "gone")})
    assert [bench.has(name) for name in ("tiny-lm", "here", "gone", "unnamed")] == [True, True, False, False]


MEASURES = ("nDCG@10", "RR@10", "R@10", "CandR@10", "CandR_clean@10", "CandHit@10", "CandHit_clean@10")


def measured(value, queries=6):
    """Return what was measured on a collection: around a value, a little different for each query."""
    each = {f"q{i}": value + 0.01 * i for i in range(queries)}
    kinds = {kind: dict.fromkeys(MEASURES, each) for kind in ("per_query", "mixed")}
    return {**kinds, "passages/s": 100.0}


def finished(cell, value, dev=(0.4, 0.5)):
    """Return a finished cell."""
    history = [{"step": 40 * (i + 1), "eval_RR@10": one} for i, one in enumerate(dev)]
    test = {cell.home: measured(value)} if cell.test else {}
    facts = {"trained_parameters": 12_345, "training_seconds": 67.0, "history": history, "test": test}
    return {"cell": {"row": cell.row, "home": cell.home}, **facts}


def test_tables_of_what_is_finished(module, tmp_path):
    cells = module("cells")
    folder = tmp_path / "cells"
    folder.mkdir()
    alone = {home: measured(0.2) for home in cells.HOMES}
    (folder / "baselines.json").write_text(json.dumps({"bm25": alone, "zero_shot": alone}))
    (tmp_path / "dev-baselines.json").write_text(json.dumps({"bm25": 0.477, "zero_shot": 0.414, "made": {}}))
    values = {"zero_shot": {"q1": 0.5, "q2": 0.7}, "qpeft_r-k5, 640 queries": {"q1": 0.6, "q2": 0.7}}
    chosen = {name: {"mini": own, "squad": own} for name, own in values.items()}
    (tmp_path / "choice.json").write_text(json.dumps({**chosen, "made": {}}))
    for name, group in cells.GROUPS.items():
        for cell in group():
            if cell.seed < 3 and name in ("main", "sizes", "lora_tuning", "models"):
                value = 0.1 if cell.row == "zero_shot" else 0.3 + 0.01 * cell.seed
                (folder / f"{cell.name}.json").write_text(json.dumps(finished(cell, value)))
    stale = folder / "squad-320-qpeft_a-seed1-00000000.json"
    stale.write_text(json.dumps(finished(cells.Cell("qpeft_a", "qpeft_a", "squad"), 0.9)))
    done = subprocess.run(
        [sys.executable, str(RECIPE / "table.py"), "--cells", str(folder), "--output", str(tmp_path / "results")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert str(stale) in done.stderr
    assert done.stderr.count("left out") == 1
    text = (tmp_path / "results" / "tables.md").read_text(encoding="utf-8")
    (home,) = (part for part in text.split("### ") if part.startswith("Trained on squad, 320 queries; measured"))
    rows = {line.split(" | ")[0].strip("| "): line for line in home.splitlines() if line.startswith("| ")}
    assert "0.340 ± 0.007" in rows["qpeft_a (2)"], "the stale cell must not count"
    assert rows["zero_shot, half BM25"].count("0.225") == len(MEASURES)
    (other,) = (part for part in text.split("### ") if "on tiny-lm-moe" in part and "measured on" in part)
    assert "| zero_shot | 0.125" in other, "another model has a zero-shot of its own"
    assert "+0.215 (p" in other
    (tuned,) = (part for part in text.split("### ") if part.startswith("Learning rates of LoRA"))
    assert "| zero_shot | 0.414 |  |  |" in tuned
    assert "| lora-lr0.001 (1) |  | 0.400 | 0.500 |" in tuned
    assert "| qpeft_a (2) | 12,345 | 67 | 100 |" in text
    assert "| adapter | mini (2) | squad (2) |" in text
    assert "| qpeft_r-k5, 640 queries | 0.650 (+0.050) | 0.650 (+0.050) |" in text
    pictures = {path.name for path in (tmp_path / "results").glob("*.png")}
    assert {
        f"{begin}{kind}.png" for begin in ("", "squad-") for kind in ("ablations", "sizes", "parameters")
    } <= pictures


def test_a_mixture_of_experts_starts_near_the_dense_model(module, monkeypatch):
    start = module("start", RECIPES / "tiny-lm")
    dense = build_family("llama")
    ids = torch.arange(3, 40)[None]
    torch.manual_seed(0)
    made = {}
    for share in (0.0, start.PERTURBED):
        monkeypatch.setattr(start, "PERTURBED", share)
        made[share] = start.upcycled(dense).eval()
    with torch.no_grad():
        expected, same, near = (model(input_ids=ids).logits for model in (dense, *made.values()))
    torch.testing.assert_close(same, expected, atol=1e-4, rtol=0)
    assert 0 < (near - expected).abs().mean() < 0.5 * expected.std()
    experts = made[start.PERTURBED].model.layers[0].mlp.experts.gate_up_proj
    assert len(experts) == 4
    assert all(not torch.equal(experts[0], expert) for expert in experts[1:])
