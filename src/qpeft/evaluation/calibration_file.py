"""A fitted calibration as a file: the map, what its scores are scores of, and what it was fitted on.

A calibration says nothing of another model, template or adapter, so these are compared before it is used.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qpeft.data.files import StrPath
from qpeft.data.records import read_json, write_json
from qpeft.errors import FormatError, InputError, ScoreError
from qpeft.evaluation.calibration import Isotonic, Platt
from qpeft.types import UNREADABLE

FILE = "calibration.json"
"""Its name in an adapter folder."""
MAPS: dict[str, type[Platt] | type[Isotonic]] = {"platt": Platt, "isotonic": Isotonic}
_FORMAT = 1
_UNRELATED = ("template", "adapter", "queries_per_batch")
"""Options that stand in `ScoreOrigin` themselves, or change no score."""
_HELD = ("max_length", "quantization")
"""What is said of a model that stands among the options."""


@dataclass(frozen=True, slots=True)
class ScoreOrigin:
    """What scores are scores of, in the words of provenance.

    `model` has name, revision and sha256; `template` name and fingerprint; `adapter`, if there is one, name and sha256;
    `options` the method's name, those of its options that change a score, and how the model is held.
    """

    model: Mapping[str, Any]
    template: Mapping[str, Any]
    adapter: Mapping[str, Any] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        model: Mapping[str, Any],
        facts: Mapping[str, Any],
        method: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> ScoreOrigin:
        """Return the origin of a reranker's scores.

        Args:
            model: from `PretrainedLM.describe`, or as much of it as is compared.
            facts: `Reranker.facts`, or a provenance.
            method: its name.
            options: the fields of its `Config`.
        """
        adapter = facts.get("adapter")
        kept = {name: model[name] for name in _HELD if name in model}
        kept |= {name: value for name, value in (options or {}).items() if name not in _UNRELATED}
        return cls(
            {name: model.get(name) for name in ("name", "revision", "sha256")},
            {name: facts.get("template", {}).get(name) for name in ("name", "fingerprint")},
            adapter and {name: adapter.get(name) for name in ("name", "sha256")},
            {**({"method": method} if method else {}), **kept},
        )

    def difference(self, other: ScoreOrigin) -> str | None:
        """Say what differs, this one's first; None if nothing does. An option that only one of them has is let pass."""
        by = next((key for key in ("sha256", "revision") if self.model.get(key) and other.model.get(key)), "name")
        if self.model.get(by) != other.model.get(by):
            return f"model {_named(self.model, by)}, not of {_named(other.model, by)}"
        if self.template["fingerprint"] != other.template["fingerprint"]:
            return f"template {_named(self.template, 'fingerprint')}, not of {_named(other.template, 'fingerprint')}"
        own, their = self.adapter or {}, other.adapter or {}
        if own.get("sha256") != their.get("sha256"):
            return f"{_adapter(own)}, not of {_adapter(their)}"
        for name, value in self.options.items():
            if name in other.options and other.options[name] != value:
                return f"{name} {value}, not of {other.options[name]}"
        return None


@dataclass(frozen=True, slots=True)
class Calibration:
    """A map from scores to probabilities, and where it comes from.

    `centred`: it maps what a score is above the mean of its query's candidates. `origin` is None where the run was no
    model's own, such as one mixed with its first stage: then it is for such runs, and cannot be served. `fitted_on` and
    `validation` are what `qpeft calibrate` says of data and quality.
    """

    map: Platt | Isotonic
    origin: ScoreOrigin | None
    centred: bool = False
    fitted_on: Mapping[str, Any] = field(default_factory=dict)
    validation: Mapping[str, Any] = field(default_factory=dict)

    @property
    def method(self) -> str:
        """Name of the kind of map."""
        return next(name for name, kind in MAPS.items() if isinstance(self.map, kind))

    def __call__(self, scores: Sequence[float]) -> list[float]:
        """Return the probability that each passage is relevant; equal ones may belong to different scores.

        Args:
            scores: of all candidates of one query, `[N]`; what no model could read (`UNREADABLE`) has probability 0.

        Raises:
            ScoreError: a score is NaN or infinite, or there are several lists of them.
        """
        values = np.asarray(scores, dtype=np.float64)
        if values.ndim != 1:
            raise ScoreError(f"scores of one query are a list, not of shape {values.shape}")
        read = values != UNREADABLE
        if self.centred and read.any():
            values = values - values[read].mean()
        found: list[float] = np.where(read, self.map(values), 0.0).tolist()
        return found

    def check(self, origin: ScoreOrigin, name: StrPath = "the calibration") -> None:
        """Make sure that scores of that origin may be calibrated.

        Raises:
            InputError: it was fitted on scores of something else; says of what.
        """
        if self.origin is None:
            raise InputError(
                f"{name} was fitted on a run of {self.fitted_on.get('command')!r}, not on a model's scores"
            )
        different = self.origin.difference(origin)
        if different:
            raise InputError(f"{name} was fitted on scores of {different}")


def write_calibration(calibration: Calibration, path: StrPath) -> None:
    """Write a calibration as JSON; the file appears whole or not at all.

    Raises:
        InputError: it cannot be made.
    """
    content = {
        "qpeft_calibration": _FORMAT,
        "method": calibration.method,
        "centred": calibration.centred,
        "parameters": dataclasses.asdict(calibration.map),
        "origin": calibration.origin and dataclasses.asdict(calibration.origin),
        "fitted_on": dict(calibration.fitted_on),
        "validation": dict(calibration.validation),
    }
    write_json(path, content)


def read_calibration(path: StrPath) -> Calibration:
    """Read a calibration.

    Raises:
        InputError: the file cannot be opened.
        FormatError: it is no calibration, or one whose map would fall somewhere.
    """
    content = read_json(path)
    if not isinstance(content, dict) or content.get("qpeft_calibration") != _FORMAT:
        raise FormatError(path, None, "not a calibration of qpeft")
    try:
        parameters: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in content["parameters"].items()
        }
        made = MAPS[content["method"]](**parameters)
        origin = ScoreOrigin(**content["origin"]) if content["origin"] else None
        return Calibration(made, origin, content["centred"], content["fitted_on"], content["validation"])
    except (KeyError, TypeError, ValueError, AttributeError, ScoreError) as error:
        raise FormatError(path, None, f"not a calibration of qpeft: {error}") from error


def _named(facts: Mapping[str, Any], by: str) -> str:
    mark = "" if by == "name" else f" ({facts[by]:.12})"
    return f"{facts.get('name')!r}{mark}"


def _adapter(facts: Mapping[str, Any]) -> str:
    return f"adapter {_named(facts, 'sha256')}" if facts else "the model alone"
