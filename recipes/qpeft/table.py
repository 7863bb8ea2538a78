"""Turn finished cells into the tables and figures of this recipe.

    python recipes/qpeft/table.py [--cells out/qpeft/cells] [--output recipes/qpeft/results]

A row's value is the mean over seeds of the means over queries; ± is the standard deviation over seeds. Tests are paired
t-tests over queries, on each query's mean over the seeds, against zero-shot and against the soft prompt (in the tables
of LoRA, of the authors' settings, of hard prompts and of what is added to Q-PEFT-A: against Q-PEFT-A), Holm-corrected
over all rows of a table and both references. Cells that `cells.py` does not have any more are left out, by name.
"""

from __future__ import annotations

import argparse
import collections
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

from cells import GROUPS, HOMES, LATER
from confirmation import Confirmation
from figures import Rows, Zero, ablations, gains, parameters, sizes
from rows import Comparisons, against_soft_prompt, choice, costs, dev, first_stages, quality

APART = {
    "tuned": "Options that dev chose",
    "placement": "Where the hint stands",
    "lora": "LoRA",
    "authors": "Settings of the authors' code",
    "prompts": "Hard prompts",
    "negatives": "Easy negatives, and a hint without the query's words",
    "together": "A soft prompt and Q-PEFT together",
    "passages": "A prompt of every passage token",
    "models": "Other language models",
}
"""Groups with a table of their own, and its title."""
BESIDE = ("qpeft_a", "qpeft_r", "soft_prompt")
"""Rows of the main table that stand beside those of such a group."""
ON_DEV = {
    "tuning": "Learning rates",
    "lora_tuning": "Learning rates of LoRA",
    "search": "Options, one at a time",
    "authors_apart": "Settings of the authors' code, with one of ours each",
}
"""Groups that were compared on dev alone."""
TINY = LATER["model"]
NOTE = (
    "Half BM25: standardised scores of both, weight .5 as it stands, not chosen on dev; in brackets minus zero-shot, "
    "mixed likewise, Holm over the rows of a table. Seconds and passages/s were taken beside other work on the machine "
    "and are no measure of speed.\n"
)


class Key(NamedTuple):
    """What the rows of a table have in common; `group` is empty for the main ones."""

    home: str
    queries: int
    group: str
    model: str

    @property
    def title(self) -> str:
        """The beginning of its tables' titles."""
        begin = f"{APART[self.group]}: trained" if self.group else "Trained"
        with_model = "" if self.model == TINY else f"{self.model}, "
        return f"{begin} on {with_model}{self.home.replace('+', ', ')}, {self.queries} queries"


def read_cells(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the finished cells that `cells.py` has, by name; say on standard error which it has not."""
    known = {cell.name for group in GROUPS.values() for cell in group()}
    paths = sorted(path for path in folder.glob("*.json") if path.name != "baselines.json")
    for path in paths:
        if path.stem not in known:
            print(f"left out, no group of cells.py has it: {path}", file=sys.stderr)
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths if path.stem in known}


def grouped(found: dict[str, dict[str, Any]]) -> dict[Key, Rows]:
    """Return the rows of each table, of cells that were measured on test queries."""
    tables: dict[Key, Rows] = collections.defaultdict(lambda: collections.defaultdict(list))
    for group, cells in GROUPS.items():
        for cell in cells():
            if found.get(cell.name, {}).get("test"):
                key = Key(cell.home, cell.queries, group if group in APART else "", cell.model)
                tables[key][cell.row].append(found[cell.name])
    return tables


def measured_on(rows: Rows, collection: str) -> Rows:
    """Return the rows with cells that were measured on a collection."""
    some = {name: [cell for cell in cells if collection in cell["test"]] for name, cells in rows.items()}
    return {name: cells for name, cells in some.items() if cells}


def of_model(baselines: dict[str, Any], rows: Rows) -> tuple[dict[str, Any], Rows]:
    """Return baselines in which another model's own zero-shot row stands for tiny-lm's, and the other rows."""
    alone = {name: test for cell in rows.get("zero_shot", ()) for name, test in cell["test"].items()}
    return baselines | {"zero_shot": alone}, {name: cells for name, cells in rows.items() if name != "zero_shot"}


def tested(
    tables: dict[Key, Rows], baselines: dict[str, Any], output: Path
) -> tuple[list[str], dict[str, Comparisons]]:
    """Return all tables of test queries, and their comparisons; draw the gains at home."""
    texts, everything = [], {}
    for key, rows in sorted(tables.items()):
        known = baselines
        if key.model != TINY:
            known, rows = of_model(baselines, rows)
        own = key.group in ("", "models")
        second = "soft_prompt" if own else "qpeft_a"
        trained = {} if own else tables.get(key._replace(group=""), {})
        for collection in known["bm25"]:
            measured = measured_on(rows, collection)
            if not measured or collection not in known["zero_shot"]:
                continue
            beside = measured_on({n: trained[n] for n in BESIDE if n in trained}, collection)
            text, comparisons = quality(measured, beside, known, collection, second)
            if not own and "soft_prompt" in beside:
                text += against_soft_prompt(measured, beside["soft_prompt"], collection)
            count = len(known["bm25"][collection]["per_query"]["RR@10"])
            texts.append(f"### {key.title}; measured on {collection}, {count} test queries\n\n{text}")
            name = f"{key.group} {key.home} {key.queries} → {collection}".strip()
            everything[name if key.model == TINY else f"{key.model} {name}"] = comparisons
            if not key.group and collection == key.home and len(measured) > 3:
                zero = Zero(collection, known["zero_shot"][collection]["per_query"])
                gains(measured, zero, output / f"{key.home}-{key.queries}-{collection}.png")
        home = key.home.split("+")[0]
        cost = costs(measured_on(rows, home), known["zero_shot"].get(home, {}), home)
        texts.append(f"### {key.title}; what it costs\n\n{cost}")
    return texts, everything


def settings(found: dict[str, dict[str, Any]], path: Path) -> list[str]:
    """Return the tables of what was compared on dev of reddit-shift, with what was not trained beside it."""
    beside = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    beside.pop("made", None)
    unchanged = {
        "search": [cell for cell in GROUPS["main"]() if cell.row in ("qpeft_a", "qpeft_r")],
        "authors_apart": [cell for cell in GROUPS["authors"]() if cell.seed == 1 and cell.adapter],
    }
    texts = []
    for group, title in ON_DEV.items():
        cells = [*GROUPS[group](), *(cell for cell in unchanged.get(group, ()) if cell.home == "reddit-shift")]
        some = [found[cell.name] for cell in cells if cell.name in found]
        if any(cell.name in found for cell in GROUPS[group]()):
            texts.append(f"### {title}: RR@10 on dev of reddit-shift, 150 queries\n\n{dev(some, beside)}")
    return texts


def draw(tables: dict[Key, Rows], baselines: dict[str, Any], output: Path) -> None:
    """Draw the pictures of each home for which there are rows."""
    for home in HOMES:
        begin = "" if home == HOMES[0] else f"{home}-"
        zero = Zero(home, baselines["zero_shot"][home]["per_query"])
        by_size = {count: tables.get(Key(home, count, "", TINY), {}) for count in (80, 320, 1280)}
        main_rows = by_size[320]
        if len(main_rows) <= 3:
            continue
        ablations(main_rows, zero, output / f"{begin}ablations.png")
        others = [tables.get(Key(home, 320, group, TINY), {}) for group in ("lora", "authors")]
        parameters(main_rows | others[0] | others[1], zero, output / f"{begin}parameters.png")
        if by_size[80] and by_size[1280]:
            sizes(by_size, zero, output / f"{begin}sizes.png")


def main() -> None:
    """Write all tables, comparisons and pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=Path, default=Path("out/qpeft/cells"))
    parser.add_argument("--output", type=Path, default=Path("recipes/qpeft/results"))
    args = parser.parse_args()
    baselines = json.loads((args.cells / "baselines.json").read_text(encoding="utf-8"))
    found = read_cells(args.cells)
    tables = grouped(found)
    args.output.mkdir(parents=True, exist_ok=True)
    texts, everything = tested(tables, baselines, args.output)
    draw(tables, baselines, args.output)
    if (args.cells.parent / "confirm").is_dir():
        trial = args.cells.parent / "first-trial.json"
        before = json.loads(trial.read_text(encoding="utf-8"))["bm25"]["per_query"]["RR@10"] if trial.exists() else ()
        confirmation = Confirmation(args.cells.parent / "confirm", before)
        everything["confirmation"] = confirmation.tests()
        texts.insert(0, confirmation.markdown(everything["confirmation"]))
    if (stages := args.cells.parent / "first-stages.json").is_file():
        texts.append(f"### The adapters that ship, over other first stages\n\n{first_stages(stages)}")
    if (chosen := args.cells.parent / "choice.json").is_file():
        texts.append(f"### What ships and what may: RR@10 on dev\n\n{choice(chosen)}")
    texts += settings(found, args.cells.parent / "dev-baselines.json")
    (args.output / "tables.md").write_text("\n".join([NOTE, *texts]), encoding="utf-8")
    (args.output / "comparisons.json").write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
