"""What all integrations share: how the model is given, and what is said when the library is not there."""

import importlib
import sys
import tomllib
from pathlib import Path

import pytest

from qpeft.errors import MissingDependencyError, OptionError
from qpeft.integrations._opening import open_reranker

EXTRAS = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]["optional-dependencies"]
MODULES = {
    "sentence_transformers": ("sentence_transformers", "dense"),
    "pyterrier": ("pyterrier", "pyterrier"),
    "langchain": ("langchain_core", "langchain"),
    "llama_index": ("llama_index", "llama-index"),
    "haystack": ("haystack", "haystack"),
    "mteb": ("mteb", "mteb"),
}


def test_every_integration_is_listed():
    folder = Path(importlib.import_module("qpeft.integrations").__file__).parent
    assert {path.stem for path in folder.glob("[a-z]*.py")} == set(MODULES)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_missing_library_is_named_with_its_extra(name, monkeypatch):
    package, extra = MODULES[name]
    for loaded in [module for module in sys.modules if module == package or module.startswith(package + ".")]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"qpeft.integrations.{name}", raising=False)
    with pytest.raises(MissingDependencyError, match=rf"pip install 'qpeft\[{extra}\]'"):
        importlib.import_module(f"qpeft.integrations.{name}")
    required = {requirement.split(">")[0].replace("-", "_") for requirement in EXTRAS[extra]}
    assert any(package in requirement for requirement in required), f"the extra {extra} does not bring {package}"


def test_a_ready_reranker_is_taken_as_it_is(tiny):
    assert open_reranker(tiny, {}) is tiny
    with pytest.raises(OptionError, match="'template' is an option of opening a model"):
        open_reranker(tiny, {"template": "upr"})


def test_options_reach_the_model(saved_model):
    opened = open_reranker(str(saved_model), {"template": "upr", "dtype": "float32"})
    assert opened.facts["template"]["name"] == "upr"
    with pytest.raises(OptionError, match="did you mean 'template'"):
        open_reranker(str(saved_model), {"tmplate": "upr"})
