"""What can be asked for: the base model alone, and each adapter over it.

An adapter is found by its name in a listing of the folder; no path that a client sends is ever opened.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qpeft import methods
from qpeft.adapter import withdrawn_on_failure
from qpeft.adapters._folder import AdapterFolder, adapter_path, embedded_adapters, open_adapter
from qpeft.errors import AdapterError, InputError, OptionError, QpeftError, ScoreError, nearest
from qpeft.evaluation.calibration_file import Calibration, ScoreOrigin, read_calibration
from qpeft.kept_tokens import KeptTokens
from qpeft.lm.encoding import ContextEncoder
from qpeft.lm.pretrained import PretrainedLM
from qpeft.methods._rows import RowScorer
from qpeft.model_config import EMBEDDED
from qpeft.server.logs import log
from qpeft.server.settings import Settings
from qpeft.types import Passage, Query

KEPT_CHARACTERS = 8_000_000
"""Of documents whose tokens are kept; some 100 MB."""


class UnknownModelError(InputError):
    """A model or an adapter that is not there."""


@dataclass(eq=False)
class ServedModel:
    """A name that requests may ask for.

    `calibration` turns the raw scores of a query's documents into probabilities; without one, what the method says
    stands for it: of query likelihood, the geometric mean of the query tokens' probabilities. `method` is its name.
    """

    name: str
    scorer: RowScorer
    adapter: AdapterFolder | None = None
    calibration: Calibration | None = None
    method: str = "query_likelihood"
    created: int = field(default_factory=lambda: int(time.time()))
    users: int = 0
    _unused: asyncio.Event = field(default_factory=asyncio.Event)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Count a user within this context."""
        self.users += 1
        try:
            yield
        finally:
            self.users -= 1
            self._unused.set()

    async def unused(self) -> None:
        """Return once nobody uses it."""
        while self.users:
            self._unused.clear()
            await self._unused.wait()


class Models:
    """The served models; all share one base.

    Args:
        lm: the base.
        settings: options.
    """

    def __init__(self, lm: PretrainedLM, settings: Settings) -> None:
        self.lm = lm
        if isinstance(lm, ContextEncoder) and (lm.store is None or lm.store.folder is None):
            lm.repeatable = False  # nobody resumes a request, and many have few passages
        self.base = Path(lm.name).name if Path(lm.name).is_dir() else lm.name
        self._settings = settings
        self._folder = None if settings.adapters is None else Path(settings.adapters)
        self._kept = KeptTokens(KEPT_CHARACTERS)
        name = "query_likelihood" if lm.has_words else "classifier"
        method = methods.load(name)
        config = method.Config(template=settings.template, max_passage_tokens=settings.max_passage_tokens)
        scorer = method.build_scorer(config, lm, kept=self._kept)
        calibration = read_calibration(settings.calibration) if settings.calibration else None
        if calibration is not None:
            calibration.check(self._origin(scorer, name, config), f"--calibration {settings.calibration}")
        self._served = {self.base: ServedModel(self.base, scorer, None, calibration, name)}

    @property
    def served(self) -> dict[str, ServedModel]:
        """What can be asked for now, the base first."""
        return dict(self._served)

    def find(self, name: str | None) -> ServedModel:
        """Return the model of a name; None is the base.

        Raises:
            UnknownModelError: there is none of that name.
        """
        found = self._served.get(name or self.base)
        if found is None:
            raise UnknownModelError(f"no model {str(name)[:200]!r}{nearest(str(name)[:200], self._served)}")
        return found

    def available(self) -> dict[str, Path]:
        """Return the adapter folders by name: the embedded ones for the embedded model, then those of the folder."""
        found = {}
        if self.lm.name == EMBEDDED:
            found = {name: adapter_path(name) for name in embedded_adapters()}
        if self._folder is not None:
            found |= {path.name: path for path in _listed(self._folder) if _usable(path, self._folder)}
        return found

    def open(self, name: str) -> ServedModel:
        """Open an adapter of the folder; to be called where the model may be touched. It is not served yet.

        Raises:
            UnknownModelError: the folder has none of that name.
            AdapterError: it is damaged, or made for another model.
        """
        available = self.available()
        if name not in available:
            raise UnknownModelError(f"no adapter {name!r}{nearest(name, available)}")
        try:
            opened = open_adapter(available[name], self.lm, None)
            with withdrawn_on_failure(opened.adapter):
                method = methods.load(opened.method)
                config = method.Config(max_passage_tokens=self._settings.max_passage_tokens)
                scorer = method.build_scorer(config, self.lm, opened, kept=self._kept)
                if opened.calibration is not None:
                    _check(name, opened.calibration, self._origin(scorer, opened.method, config))
                made = ServedModel(f"{self.base}:{name}", scorer, opened, opened.calibration, opened.method)
                warm_up(made)
        except (OptionError, ScoreError) as error:
            raise AdapterError(f"adapter {name!r}: {error}") from error
        return made

    def _origin(self, scorer: RowScorer, method: str, config: Any) -> ScoreOrigin:
        """Return what a scorer's scores are scores of."""
        return ScoreOrigin.of(self.lm.describe(), scorer.facts, method, dataclasses.asdict(config))

    def serve(self, model: ServedModel) -> ServedModel | None:
        """Let a model be asked for, from now on; return what had its name before."""
        before = self._served.get(model.name)
        self._served[model.name] = model
        return before

    def drop(self, name: str) -> ServedModel:
        """Take an adapter out of service; it may still be in use.

        Raises:
            UnknownModelError: it is not served.
        """
        adapters = {key.removeprefix(f"{self.base}:"): key for key in self._served if key != self.base}
        if name not in adapters:
            raise UnknownModelError(f"adapter {name!r} is not served{nearest(name, adapters)}")
        return self._served.pop(adapters[name])

    def open_all(self) -> Iterator[None]:
        """Serve every adapter that fits the base, one at a step; one that does not is logged.

        Raises:
            ScoreError: the base gives no number for a score.
        """
        warm_up(self._served[self.base])
        for name in () if self.lm.has_encoder else self.available():
            yield
            try:
                self.serve(self.open(name))
            except QpeftError as error:
                log("adapter not served", logging.WARNING, adapter=name, reason=str(error))
            except Exception as error:  # whatever a damaged folder ends in, the others are served
                log("adapter not served", logging.WARNING, adapter=name, reason=repr(error), exception=error)


def _check(name: str, calibration: Calibration, origin: ScoreOrigin) -> None:
    try:
        calibration.check(origin, f"adapter {name!r}: its calibration")
    except InputError as error:
        raise AdapterError(str(error)) from error


def _listed(folder: Path) -> list[Path]:
    """Return what a folder holds; nothing, and a warning, if it cannot be read by now."""
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        log("adapters not listed", logging.WARNING, folder=str(folder), reason=str(error))
        return []


def _usable(path: Path, root: Path) -> bool:
    """Return whether this is a folder whose files all lie within `root`, whatever the links, and has a plain name."""
    if path.name.startswith(".") or not path.name.isprintable():
        return False
    try:
        return all(each.resolve(strict=True).is_relative_to(root.resolve()) for each in (path, *path.iterdir()))
    except PermissionError:
        return path.resolve().is_relative_to(root.resolve())  # opening it will say why it cannot be read
    except (OSError, RuntimeError):
        return False


def warm_up(model: ServedModel) -> None:
    """Score something once, so that the first request does not pay for what is set up on first use.

    Raises:
        ScoreError: the score is no number.
    """
    (score,) = model.scorer.score([(Query("query", "what is this"), Passage("passage", "this is a passage"))])
    if not math.isfinite(score):
        raise ScoreError(f"{model.name} gave the score {score}")
