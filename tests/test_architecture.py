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
    {"types", "registry", "atomic", "options"},
    {"model_config", "kept_tokens", "plain_text"},
    {"memory"},
    {"template", "adapter", "losses", "pointwise"},
    {"data"},
    {"provenance"},
    {"retrieval"},
    {"evaluation", "tuning"},
    {"lm.agreement", "lm.cpu_attention", "lm.hints", "lm.context_store", "lm.depth", "lm.read_out", "lm.side_by_side"},
    {"lm.compiled", "lm.layout", "lm.flops", "lm.last_layer", "lm.past", "lm.per_layer", "lm.replay", "lm.waiting"},
    {"lm.model_checks", "lm.pretrained", "lm.quantized"},
    {"lm.encoding"},
    {"lm.causal", "lm.encoder_decoder"},
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
    """Return the part of the house that a file stands in; in `lm` every file is one of its own."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:2] if parts[0] == "lm" else parts[:1])


def is_module(path):
    return path.is_dir() or path.with_suffix(".py").is_file()


def imported_rooms(path):
    """Yield the rooms that a file imports at module level, outside `if TYPE_CHECKING`."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "qpeft":
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            paths = [ROOT.parent.joinpath(*name.split(".")) for name in names]
            yield from {room(path if is_module(path) else path.parent) for path in paths}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    if path in (ROOT / "__init__.py", ROOT / "lm" / "__init__.py"):
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
