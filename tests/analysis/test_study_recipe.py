"""The recipe of the study: what it trains and asks, and a page that says what its results say."""

import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RECIPE, PAGE = ROOT / "recipes" / "relevance-study", ROOT / "docs" / "relevance-study.md"


@pytest.fixture
def cells(monkeypatch):
    """The recipe's module of this name; another recipe has one too."""
    monkeypatch.syspath_prepend(str(RECIPE))
    monkeypatch.delitem(sys.modules, "cells", raising=False)
    yield importlib.import_module("cells")
    sys.modules.pop("cells")


def check(folder):
    command = [sys.executable, str(folder / "recipes" / "relevance-study" / "table.py"), "--check"]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_page_says_what_the_results_say():
    done = check(ROOT)
    assert done.returncode == 0, done.stderr


def test_a_page_that_says_anything_else_is_found(tmp_path):
    shutil.copytree(
        RECIPE, tmp_path / "recipes" / "relevance-study", ignore=shutil.ignore_patterns("*.png", "*layers*")
    )
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / PAGE.name
    page.write_text(PAGE.read_text())
    fill = [sys.executable, str(tmp_path / "recipes" / "relevance-study" / "table.py")]
    assert subprocess.run(fill).returncode == 0
    assert "largest gains of one layer alone |  | not measured yet" in page.read_text(), "what has no file"
    assert check(tmp_path).returncode == 0
    changed = re.sub(r"(gain \+0\.30)\d", r"\g<1>0", page.read_text(), count=1)
    assert changed != page.read_text()
    page.write_text(changed)
    done = check(tmp_path)
    assert done.returncode == 1
    assert "gain +0.300" in done.stderr
    assert len(re.findall(r"^[-+] *\|", done.stderr, re.MULTILINE)) == 2, "the line as it is, and as it should be"


def test_budgets_are_equal_by_shape(cells):
    """Of tiny-lm, both components have 331,776 parameters at rank 8; a rank of one has 18,432 and 23,040."""
    assert cells.equal_ranks("tiny-lm") == {"attention": 18, "mlp": 14}


def asked(cells, method, parts):
    scope = cells.Scope("squad", method, {"attention": 18, "mlp": 14})
    return [item for part in parts for item in cells.PARTS[part](scope)]


def test_what_is_trained_and_asked(cells):
    whole = [part for part in cells.PARTS if part not in ("rates", "grid")]
    for method, count in (("query_likelihood", 24), ("classifier", 24), ("yes_no", 30)):
        items = asked(cells, method, whole)
        trained = {item for item in items if isinstance(item, cells.Cell)}
        assert len(trained) == len({cell.name for cell in trained}) == count
        needed = {cell for item in items if isinstance(item, cells.Asked) for cell in item.cells}
        assert needed == trained
    names = {cell.name for cell in asked(cells, "yes_no", ["losses"])[:-1]}
    assert {"squad-yes_no-all-r8-seed2", "squad-yes_no-all-r8-sft-seed2"} < names
    assert {cell.loss for cell in asked(cells, "yes_no", ["losses"])[:-1]} == {"softmax", "cross_entropy", "sft"}
    (grid,) = (item for item in asked(cells, "classifier", ["grid"]) if isinstance(item, cells.Asked))
    assert (grid.name, grid.study) == ("squad-classifier-grid", ["projections", "--grid"])
    assert (grid.options["depth"], grid.options["limit-queries"]) == (5, 100)
    rates = asked(cells, "classifier", ["rates"])
    assert rates[0].name == "squad-classifier-all-r8-lr0.0001-seed1"
    assert len(rates) == 4
    tried = {(cell.loss, cell.learning_rate) for cell in asked(cells, "yes_no", ["rates"])}
    assert tried == {("softmax", rate) for rate in cells.RATES} | {
        (loss, rate) for loss in ("cross_entropy", "sft") for rate in cells.AROUND
    }
    chosen = {cell.loss: cell.learning_rate for cell in asked(cells, "yes_no", ["losses"])[:-1]}
    assert chosen == {"softmax": 3e-3, "cross_entropy": 3e-3, "sft": 1e-3}
