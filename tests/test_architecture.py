"""The order of the house: imports at module level point down this list only."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import qpeft

ROOT = Path(qpeft.__file__).parent
LAYERS = [
    {"errors"},
    {"types", "registry", "agreement", "atomic", "options"},
    {"model_config", "kept_tokens", "plain_text"},
    {"cpu_attention", "memory"},
    {"template", "hints", "context_store", "depth", "losses", "read_out", "side_by_side"},
    {"compiled", "layout", "flops", "last_layer", "past", "per_layer", "replay", "waiting", "model_checks"},
    {"data"},
    {"provenance"},
    {"retrieval"},
    {"evaluation", "tuning"},
    {"pretrained"},
    {"encoding"},
    {"lm", "encoder_decoder"},
    {"adapters"},
    {"methods"},
    {"analysis"},
    {"loading"},
    {"training"},
    {"server"},
    {"commands", "integrations"},
    {"cli"},
    {"__main__"},
]
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
FILES = sorted(ROOT.rglob("*.py"))


def room(path):
    parts = path.relative_to(ROOT).parts
    return parts[0].removesuffix(".py")


def imported_rooms(path):
    """Yield the rooms that a file imports at module level, outside `if TYPE_CHECKING`."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "qpeft":
            parts = node.module.split(".")[1:]
            yield from [parts[0]] if parts else [alias.name for alias in node.names]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    if path == ROOT / "__init__.py":
        return
    own = room(path)
    assert own in LEVEL, f"{own} has no place in LAYERS"
    for other in imported_rooms(path):
        assert other == own or LEVEL[other] < LEVEL[own], f"{own} imports {other}, which stands above it"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_one_idea_one_file(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


def test_torch_is_imported_only_when_there_is_work():
    rooms = ["qpeft.data.collection", "qpeft.data.convert", "qpeft.retrieval.bm25", "qpeft.retrieval.dense"]
    rooms += ["qpeft.retrieval.fusion", "qpeft.evaluation.interpolation", "qpeft.methods.cascade", "qpeft.cli"]
    code = f"import sys, {', '.join(rooms)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_public_names_are_sorted_and_importable():
    assert qpeft.__all__ == sorted(qpeft.__all__)
    assert all(hasattr(qpeft, name) for name in qpeft.__all__)


def test_deliberate_bugs_are_of_the_code_as_it_is():
    """What tests/mutations.md changes stands in the file that it names, and the file of the test beside it exists."""
    tests = Path(__file__).parent
    rows = re.findall(r"^\| `([^`]+)` \| `([^`]+)`.* \| `(test_\w+\.py)`", (tests / "mutations.md").read_text(), re.M)
    assert len(rows) > 150
    for file, code, test in rows:
        assert code.replace("\\|", "|") in (ROOT / file).read_text(encoding="utf-8"), f"{file}: {code}"
        assert list(tests.rglob(test)), test
