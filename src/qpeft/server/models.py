"""What can be asked for: the base model alone, and each adapter over it.

An adapter is found by its name in a listing of the folder; no path that a client sends is ever opened.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from qpeft.adapters._folder import AdapterFolder, adapter_path, embedded_adapters, load_adapter
from qpeft.errors import AdapterError, InputError, OptionError, QpeftError, nearest
from qpeft.methods.query_likelihood import Config, QueryLikelihood, build_scorer
from qpeft.model_config import EMBEDDED
from qpeft.pretrained import LanguageModel
from qpeft.server.logs import log
from qpeft.server.settings import Settings
from qpeft.types import Passage, Query

Calibration = Callable[[Sequence[float]], Sequence[float]]
"""Raw scores of one query's documents in nats → probabilities of relevance."""


class UnknownModelError(InputError):
    """A model or an adapter that is not there."""


@dataclass(eq=False)
class ServedModel:
    """A name that requests may ask for.

    `calibration` turns raw scores into probabilities; without one, the geometric mean of the query tokens'
    probabilities stands for it.
    """

    name: str
    scorer: QueryLikelihood
    adapter: AdapterFolder | None = None
    calibration: Calibration | None = None
    created: int = field(default_factory=lambda: int(time.time()))
    users: int = 0
    unused: asyncio.Event = field(default_factory=asyncio.Event)


class Models:
    """The served models; all share one base.

    Args:
        lm: the base.
        settings: options.
    """

    def __init__(self, lm: LanguageModel, settings: Settings) -> None:
        self.lm = lm
        self.base = Path(lm.name).name if Path(lm.name).is_dir() else lm.name
        self._settings = settings
        self._folder = None if settings.adapters is None else Path(settings.adapters)
        if self._folder is not None and not self._folder.is_dir():
            raise OptionError(f"--adapters {settings.adapters}: no such folder")
        config = Config(template=settings.template, max_passage_tokens=settings.max_passage_tokens)
        self._served = {self.base: ServedModel(self.base, build_scorer(config, lm))}

    @property
    def served(self) -> dict[str, ServedModel]:
        """What can be asked for now, the base first."""
        return dict(self._served)

    @contextmanager
    def using(self, name: str | None) -> Iterator[ServedModel]:
        """Give the model of a name, which is not taken away within this context; None is the base.

        Raises:
            UnknownModelError: there is none of that name.
        """
        found = self._served.get(name or self.base)
        if found is None:
            raise UnknownModelError(f"no model {name!r}{nearest(str(name), self._served)}")
        found.users += 1
        try:
            yield found
        finally:
            found.users -= 1
            if not found.users:
                found.unused.set()

    def available(self) -> dict[str, Path]:
        """Return the adapter folders by name: the embedded ones for the embedded model, then those of the folder.

        A link that leads out of the folder is left out.
        """
        found = {}
        if self.lm.name == EMBEDDED:
            found = {name: adapter_path(name) for name in embedded_adapters()}
        if self._folder is not None:
            root = self._folder.resolve()
            for path in sorted(self._folder.iterdir()):
                real = path.resolve()
                inside = all(each.resolve().is_relative_to(root) for each in (path, *path.glob("*")))
                if inside and real.is_dir() and not path.name.startswith("."):
                    found[path.name] = real
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
            opened = load_adapter(available[name], self.lm)  # type: ignore[arg-type]
        except OptionError as error:
            raise AdapterError(str(error)) from error
        scorer = build_scorer(Config(max_passage_tokens=self._settings.max_passage_tokens), self.lm, opened)
        made = ServedModel(f"{self.base}:{name}", scorer, opened)
        warm_up(made)
        return made

    def serve(self, model: ServedModel) -> None:
        """Let a model be asked for, from now on."""
        self._served[model.name] = model

    async def drop(self, name: str) -> ServedModel:
        """Take an adapter out of service and return it once nobody uses it.

        Raises:
            UnknownModelError: it is not served.
        """
        adapters = {key.removeprefix(f"{self.base}:"): key for key in self._served if key != self.base}
        if name not in adapters:
            raise UnknownModelError(f"adapter {name!r} is not served{nearest(name, adapters)}")
        model = self._served.pop(adapters[name])
        while model.users:
            model.unused.clear()
            await model.unused.wait()
        return model

    def open_all(self) -> None:
        """Serve every adapter that fits the base; one that does not is logged."""
        warm_up(self._served[self.base])
        if self.lm.has_encoder:
            return
        for name in self.available():
            try:
                self.serve(self.open(name))
            except QpeftError as error:
                log("adapter not served", logging.WARNING, adapter=name, reason=str(error))


def warm_up(model: ServedModel) -> None:
    """Score something once, so that the first request does not pay for what is set up on first use."""
    model.scorer.score([(Query("query", "what is this"), Passage("passage", "this is a passage"))])
