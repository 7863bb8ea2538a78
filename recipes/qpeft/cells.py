"""The cells of the experiment: what is trained on what, with which options and seed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from types import ModuleType
from typing import Any, Literal

from qpeft.adapters import qpeft_a, qpeft_r
from qpeft.training.config import Authors as TrainingAuthors

SEEDS = (1, 2, 3)
HOMES = ("reddit-shift", "squad")
"""What rows, sizes and LoRA are trained on."""
LATER = {"model": "tiny-lm", "negatives": "bm25", "select_seed": 0, "soft_length": 0}
"""Settings that came after the first cells had their names; names leave them out at these defaults."""


@dataclass(frozen=True)
class Cell:
    """One training, and where its result is measured."""

    row: str
    """Name of the row in the table."""
    adapter: str
    """Its name; empty for the model alone."""
    home: str
    """Collection that is trained on; several are joined by +."""
    queries: int = 320
    seed: int = 1
    options: dict[str, Any] = field(default_factory=dict)
    """Of the adapter."""
    training: dict[str, Any] = field(default_factory=dict)
    """Of training."""
    template: str = "plain"
    shuffled: bool = False
    """The adapter reads another query than the one that is scored, in training and in test (control)."""
    test: bool = True
    """Whether the home's test queries are ranked (the first home's); otherwise dev alone."""
    model: str = "tiny-lm"
    """The language model; one that does not ship is given to `run.py` by --model."""
    negatives: Literal["bm25", "random"] = "bm25"
    """Of training: BM25's first passages for the query, or any of the collection."""

    @property
    def name(self) -> str:
        """A name that is the same for the same settings alone."""
        facts = named(asdict(self))
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:8]
        model = "" if self.model == LATER["model"] else f"{self.model}-"
        return f"{model}{self.home}-{self.queries}-{self.row}-seed{self.seed}-{digest}"


def named(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that count for a name."""
    return {key: value for key, value in settings.items() if key not in LATER or value != LATER[key]}


def tuning() -> Iterator[Cell]:
    """Yield the settings that were compared on dev of reddit-shift."""
    rates = {
        "qpeft_a": (1e-3, 3e-3),
        "qpeft_r": (1e-3, 3e-3),
        "soft_prompt": (3e-3, 1e-2),
        "qpeft_c": (1e-3, 3e-3),
        "passage_prompt": (1e-3, 3e-3),
    }
    for place in range(2):
        for adapter, choices in rates.items():
            training = {"learning_rate": choices[place], "evaluations": 2}
            yield Cell(f"{adapter}-lr{choices[place]}", adapter, "reddit-shift", training=training, test=False)


RATES = {"soft_prompt": 3e-3, "lora": 3e-3}
"""Learning rates that differ from 1e-3; of the soft prompt, dev cannot tell it from a higher one (README)."""


def cell(row: str, adapter: str, home: str, seed: int, queries: int = 320, **more: Any) -> Cell:
    """Return a cell with the settings that dev chose."""
    training = {"learning_rate": RATES.get(adapter, 1e-3), "epochs": 2, "evaluations": 2, **more.pop("training", {})}
    return Cell(row, adapter, home, queries, seed, training=training, **more)


def main() -> Iterator[Cell]:
    """Yield the table, with its controls."""
    for seed in SEEDS:
        # Each seed has random words of its own; the first seed's are those of the default.
        random = {"select": "random"} | ({"select_seed": seed} if seed > 1 else {})
        for home in HOMES:
            for adapter in ("qpeft_a", "qpeft_r", "soft_prompt"):
                yield cell(adapter, adapter, home, seed)
            yield cell("random_k", "qpeft_r", home, seed, options=random)
            yield cell("shuffled_a", "qpeft_a", home, seed, shuffled=True)
            yield cell("passage_prompt", "passage_prompt", home, seed)
            yield cell("qpeft_c", "qpeft_c", home, seed)


def untrained() -> Iterator[Cell]:
    """Yield modules without training; an untrained Q-PEFT-R is its hint as plain text."""
    for home in HOMES:
        for adapter in ("qpeft_a", "qpeft_r"):
            yield cell(f"untrained_{adapter[-1]}", adapter, home, 1, training={"epochs": 0})


def sizes() -> Iterator[Cell]:
    """Yield other numbers of training queries."""
    for seed in SEEDS:
        for home in HOMES:
            for queries in (80, 1280):
                for adapter in ("qpeft_a", "qpeft_r", "soft_prompt"):
                    yield cell(adapter, adapter, home, seed, queries)


KEPT: dict[tuple[str, str], tuple[dict[str, Any], dict[str, Any]]] = {
    ("squad", "qpeft_a"): ({}, {"margin": 0.5}),
    ("nq-mini", "qpeft_r"): ({"k": 15}, {"margin": 0.7}),
}
"""Where the authors kept other settings for a dataset than their code's defaults: SQuAD and Natural Questions.

The shifted collections are none of their datasets.
"""


def of_authors(
    row: str, module: ModuleType, home: str, seed: int, options: dict[str, Any], training: dict[str, Any], **more: Any
) -> Cell:
    """Return a cell with the settings of the authors' code, but for some."""
    return Cell(
        row,
        module.__name__.rpartition(".")[2],
        home,
        seed=seed,
        options=named(asdict(module.Authors(**options))),
        training=named(asdict(TrainingAuthors(**training)) | {"report_to": []}),
        **{"template": AUTHORS, **more},
    )


AUTHORS = "qpeft_authors"
"""Their template."""


def authors() -> Iterator[Cell]:
    """Yield the settings of the authors' code; the model alone with their template, and with it but no BOS and EOS."""
    for seed in SEEDS:
        if seed == 1:
            yield Cell("zero_shot-authors-unscored", "", "reddit-shift", template="prompts/authors_unscored.yaml")
        for home in (*HOMES, "nq-mini"):
            if seed == 1:
                yield Cell("zero_shot-authors", "", home, template=AUTHORS)
            for adapter, module in (("qpeft_a", qpeft_a), ("qpeft_r", qpeft_r)):
                options, training = KEPT.get((home, adapter), ({}, {}))
                yield of_authors(f"{adapter}-authors", module, home, seed, options, training)


def authors_apart() -> Iterator[Cell]:
    """Yield the settings of the authors' code with our learning rate, or our template, for six epochs, on dev."""
    short = {"epochs": 6, "evaluations": 6}
    for name, training, template in (("lr0.001", {"learning_rate": 1e-3}, AUTHORS), ("plain", {}, "plain")):
        for adapter, module in (("qpeft_a", qpeft_a), ("qpeft_r", qpeft_r)):
            row, more = f"{adapter}-authors-{name}", {"template": template, "test": False}
            yield of_authors(row, module, "reddit-shift", 1, {}, {**short, **training}, **more)


def passages() -> Iterator[Cell]:
    """Yield prompts of the passage alone in which each of its tokens has a vector, as in PSPT (arXiv 2405.20654)."""
    for seed in SEEDS:
        for home in HOMES:
            yield cell("passage_prompt-all", "passage_prompt", home, seed, options={"form": "all"})


def lora_tuning() -> Iterator[Cell]:
    """Yield learning rates of LoRA that were compared on dev."""
    for rate in (3e-4, 1e-3, 3e-3, 1e-2):
        training = {"learning_rate": rate, "epochs": 2, "evaluations": 2}
        yield Cell(f"lora-lr{rate}", "lora", "reddit-shift", options={"r": 4}, training=training, test=False)


def lora() -> Iterator[Cell]:
    """Yield LoRA: with about as many parameters as Q-PEFT-A, with rank 8, and with Q-PEFT-A's hint."""
    for seed in SEEDS:
        for home in HOMES:
            for name, options in (
                ("lora_r4", {"r": 4}),
                ("lora_r8", {"r": 8}),
                ("lora_r4+qpeft_a", {"r": 4, "hint": "qpeft_a"}),
            ):
                yield cell(name, "lora", home, seed, options=options)


PROMPTS = {"p1": "qpeft", "p2": "prompts/p2.yaml", "p3": "prompts/p3.yaml", "p4": "prompts/p4.yaml"}
"""Hard prompts: an instruction each. Files are of this folder."""
WORDS = {"": {}, "-keywords": {"hint_prefix": "keywords:"}, "-query": {"hint_prefix": "query:"}}
"""Words before the hint; the default is `hints:`."""


def prompts() -> Iterator[Cell]:
    """Yield hard prompts × words before the hint, for the model alone and under Q-PEFT-A.

    For the model alone, the hint is passage words as plain text, which is what an untrained Q-PEFT-R writes.
    """
    for seed in SEEDS:
        for prompt, template in PROMPTS.items():
            if seed == 1:
                yield Cell(f"zero_shot-{prompt}", "", "reddit-shift", template=template)
            for word, options in WORDS.items():
                more = {"template": template, "options": options}
                if seed == 1:
                    row = f"plain_hint-{prompt}{word}"
                    yield cell(row, "qpeft_r", "reddit-shift", 1, training={"epochs": 0}, **more)
                yield cell(f"qpeft_a-{prompt}{word}", "qpeft_a", "reddit-shift", seed, **more)


BEST: tuple[dict[str, Any], ...] = ({"num_heads": 8}, {"k": 20})
"""Of what is searched, what was best with one seed: two more are asked."""


def search() -> Iterator[Cell]:
    """Yield options of Q-PEFT that were compared on dev, one changed at a time."""
    changed: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
        *(("qpeft_r", {"k": k}, {}, "plain") for k in (5, 15, 20)),
        *(("qpeft_a", {"num_heads": heads}, {}, "plain") for heads in (1, 4, 8)),
        *(("qpeft_a", {}, {"margin": margin}, "plain") for margin in (0.0, 1.0)),
        *(("qpeft_a", {}, {"loss": loss}, "plain") for loss in ("point", "pair", "softmax")),
        ("qpeft_r", {"token_filter": "dsa"}, {}, "plain"),
        ("qpeft_a", {"token_filter": "s"}, {}, "plain"),
        ("qpeft_a", {}, {}, "qpeft"),
        ("qpeft_a", {}, {}, "qpeft_prefix"),
        *(("qpeft_r", {"hint_prefix": f"{word}:"}, {}, "plain") for word in ("keywords", "query")),
    ]
    for adapter, options, training, template in changed:
        settings = {"learning_rate": 1e-3, "epochs": 2, "evaluations": 2} | training
        told = [f"{name}={value}" for name, value in {**options, **training}.items()]
        told += [template] if template != "plain" else []
        row = f"{adapter}-{'-'.join(told)}".replace(":", "")
        for seed in SEEDS if options in BEST else SEEDS[:1]:
            more = {"options": options, "training": settings, "template": template, "test": False}
            yield Cell(row, adapter, "reddit-shift", seed=seed, **more)


def tuned() -> Iterator[Cell]:
    """Yield Q-PEFT with the options that the search found better, with three seeds, than the defaults."""
    for seed in SEEDS:
        for home in HOMES:
            yield cell("qpeft_a-heads8", "qpeft_a", home, seed, options={"num_heads": 8})
            yield cell("qpeft_r-k20", "qpeft_r", home, seed, options={"k": 20})


def placement() -> Iterator[Cell]:
    """Yield Q-PEFT-A with its hint before the passage, and behind it, under one template."""
    for seed in SEEDS:
        for template in ("qpeft", "qpeft_prefix"):
            yield cell(f"qpeft_a-{template}", "qpeft_a", "reddit-shift", seed, template=template)


MIXED = "reddit-shift+squad+wiki-shift+nq-mini"
"""Four collections that are trained on together."""


def transfer_homes() -> Iterator[Cell]:
    """Yield other training data, for the question of transfer."""
    for seed in SEEDS:
        yield cell("qpeft_a", "qpeft_a", MIXED, seed, 640)
        yield cell("qpeft_r", "qpeft_r", MIXED, seed, 640)
        yield cell("qpeft_a-anchor", "qpeft_a", "squad", seed, training={"anchor": 1.0})


def shipped() -> Iterator[Cell]:
    """Yield what may ship: more training queries on the four collections; `whole.choice` compares them on dev."""
    for queries in (1280, 2560):
        for adapter in ("qpeft_a", "qpeft_r"):
            yield cell(adapter, adapter, MIXED, 1, queries)


def variants() -> Iterator[Cell]:
    """Yield what else may ship: above all hints that may pull less towards shared words; see `whole.choice`."""
    changed: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "no_query_words": ({"token_filter": "dsq"}, {}),
        "k5": ({"k": 5}, {}),
        "anchor": ({}, {"anchor": 1.0}),
        "k5-anchor": ({"k": 5}, {"anchor": 1.0}),
    }
    for name, (options, training) in changed.items():
        yield cell(f"qpeft_r-{name}", "qpeft_r", MIXED, 1, 640, options=options, training=training, test=False)
    yield cell("qpeft_a-heads8", "qpeft_a", MIXED, 1, 640, options={"num_heads": 8}, test=False)
    # The embedded collection asks in other words than its passages have.
    for name, options in (("with_mini", {}), ("heads8-with_mini", {"num_heads": 8})):
        yield cell(f"qpeft_a-{name}", "qpeft_a", f"{MIXED}+mini", 1, 375, options=options, test=False)
    for name, training in (("with_mini", {}), ("with_mini-anchor", {"anchor": 1.0})):
        yield cell(f"qpeft_r-{name}", "qpeft_r", f"{MIXED}+mini", 1, 375, training=training, test=False)


def ships() -> Iterator[Cell]:
    """Yield the Q-PEFT-R that ships: the one whose smallest gain on dev, over five collections, is largest."""
    yield cell("qpeft_r-with_mini", "qpeft_r", f"{MIXED}+mini", 1, 375)


def negatives() -> Iterator[Cell]:
    """Yield easy negatives on squad, whose hard ones are in `main`: what was thought to spoil transfer.

    And a hint that may not hold the query's own words, which was thought so too.
    """
    for seed in SEEDS:
        yield cell("qpeft_a-random", "qpeft_a", "squad", seed, negatives="random")
        yield cell("qpeft_a-in_batch", "qpeft_a", "squad", seed, training={"negatives": 0, "in_batch": True})
        yield cell("qpeft_a-no_query_words", "qpeft_a", "squad", seed, options={"token_filter": "q"})


def together() -> Iterator[Cell]:
    """Yield Q-PEFT together with the vectors of a soft prompt."""
    for seed in SEEDS:
        for adapter in ("qpeft_a", "qpeft_r"):
            yield cell(f"{adapter}+soft_prompt", adapter, "reddit-shift", seed, options={"soft_length": 20})


MODELS = ("tiny-lm-llama", "tiny-lm-moe")
"""The other starting point of tiny-lm, and a mixture of experts made of it (README)."""


def models() -> Iterator[Cell]:
    """Yield other language models."""
    for seed in SEEDS:
        for model in MODELS:
            if seed == 1:
                yield Cell("zero_shot", "", "reddit-shift", model=model)
            for adapter in ("qpeft_a", "qpeft_r", "soft_prompt"):
                yield cell(adapter, adapter, "reddit-shift", seed, model=model)


GROUPS = {
    "tuning": tuning,
    "main": main,
    "untrained": untrained,
    "authors": authors,
    "authors_apart": authors_apart,
    "lora_tuning": lora_tuning,
    "lora": lora,
    "sizes": sizes,
    "prompts": prompts,
    "search": search,
    "tuned": tuned,
    "placement": placement,
    "transfer_homes": transfer_homes,
    "shipped": shipped,
    "variants": variants,
    "ships": ships,
    "negatives": negatives,
    "together": together,
    "passages": passages,
    "models": models,
}
TRANSFERRED = ("main", "tuned", "untrained", "lora", "transfer_homes", "shipped", "ships", "negatives", "together")
"""Groups that are also measured on the collections that they were not trained on."""
