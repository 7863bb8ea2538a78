"""Training text for tiny-lm: passages, and the queries that each of them answers.

Four kinds of query are attached to a passage:

* questions written by people (the train splits of the BEIR folders) or for this project (`questions/`);
* the heading under which a textbook passage stands;
* what a rule finds in a textbook passage: glossary terms, subjects of defining sentences, its most specific words;
* a sentence of the passage itself, removed from it (inverse cloze task, Lee et al. 2019, arXiv 1906.00300).

Only train splits are read; a passage that a dev or test query judges never enters.
"""

from __future__ import annotations

import collections
import json
import math
import random
import re
from dataclasses import dataclass
from pathlib import Path

STOPWORDS = frozenset(
    re.findall(
        r"\w+",
        "a about after also an and are as at be been between but by can did do does during for from had has "
        "have he her his how i in into is it its may me more my no not of on or our she so some such than "
        "that the their them then there these they this those to was we were what when where which while who "
        "whom whose why will with would you your",
    )
)
GENERIC_HEADINGS = re.compile(
    r"^(introduction|preface|glossary|handbook|conclusion|summary|key |chapter|appendix|about |connection|review|"
    r"critical thinking|further|references|suggested|exercises|problems|answer|unit )",
    re.IGNORECASE,
)
DEFINITION = re.compile(r"^(?:The |A |An )?([A-Za-z][\w’'-]*(?: [\w’'-]+){0,3}?) (is|are|was|were|refers? to|means?) ")
PRONOUNS = frozenset(
    re.findall(r"\w+", "it this that they these those there he she we you i one what which who most many some")
)


@dataclass(frozen=True)
class Source:
    """A passage, its title, and the queries it answers; `written` queries weigh more than derived ones."""

    title: str
    text: str
    written: tuple[str, ...] = ()
    heading: str = ""


def read_jsonl(path: Path) -> list[dict[str, object]]:
    """Return the objects of a JSONL file."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def read_qrels(path: Path) -> list[tuple[str, str]]:
    """Return (query id, passage id) of the relevant rows of a BEIR qrels file."""
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()[1:]]
    return [(query, passage) for query, passage, grade in rows if int(grade) > 0]


def judged_collection(folder: Path) -> list[Source]:
    """Return the passages of a BEIR folder's train split with their questions."""
    passages = {str(row["_id"]): row for row in read_jsonl(folder / "corpus.jsonl")}
    texts = {str(row["_id"]): str(row["text"]) for row in read_jsonl(folder / "queries.jsonl")}
    held_out = {p for split in ("dev", "test") for _, p in read_qrels(folder / "qrels" / f"{split}.tsv")}
    questions: dict[str, list[str]] = collections.defaultdict(list)
    for query, passage in read_qrels(folder / "qrels" / "train.tsv"):
        questions[passage].append(texts[query])
    return [
        Source(str(passages[p].get("title", "")), str(passages[p]["text"]), tuple(qs))
        for p, qs in questions.items()
        if p not in held_out
    ]


def written_passages(path: Path) -> list[Source]:
    """Return passages that were written for this recipe, with their questions."""
    return [
        Source(str(row["title"]), str(row["text"]), tuple(str(q) for q in row["questions"]))  # type: ignore[attr-defined]
        for row in read_jsonl(path)
    ]


def textbook(folder: Path, questions: Path | None) -> tuple[list[Source], list[Source]]:
    """Return (all textbook passages with headings, those for which questions were written)."""
    written: dict[str, tuple[str, ...]] = {}
    if questions is not None:
        for path in sorted(questions.glob("part-*.tsv")):
            for line in path.read_text(encoding="utf-8").splitlines():
                key, *queries = line.split("\t")
                written[key] = tuple(q.strip() for q in queries if q.strip())
    prose, asked = [], []
    for path in sorted(folder.glob("*.jsonl")):
        for number, row in enumerate(read_jsonl(path)):
            title, text = str(row["title"]), str(row["text"])
            key = f"{path.stem}:{number}"
            heading = "" if GENERIC_HEADINGS.match(title) else re.sub(r"^[^A-Za-z]+", "", title)
            prose.append(Source(title, text, (), heading))
            if key in written:
                asked.append(Source(title if heading else "", text, written[key]))
    return prose, asked


class QueryMaker:
    """Derives queries from passages; `document_frequency` tells specific words from common ones."""

    def __init__(self, sources: list[Source]) -> None:
        self.total = len(sources)
        counts: collections.Counter[str] = collections.Counter()
        for source in sources:
            counts.update(set(self.words(source.text)))
        self.document_frequency = counts

    @staticmethod
    def words(text: str) -> list[str]:
        """Return the lower-cased words that could be a search term."""
        return [w for w in re.findall(r"[a-z][a-z'-]{2,}|\d{4}", text.lower()) if w not in STOPWORDS]

    def keywords(self, text: str, rng: random.Random) -> str:
        """Return two to five of the passage's most specific words, mostly in the passage's order."""
        counts = collections.Counter(self.words(text))
        scored = {
            w: (1 + math.log(c)) * math.log(self.total / (1 + self.document_frequency[w]))
            for w, c in counts.items()
            if self.document_frequency[w] >= 3
        }
        top = sorted(scored, key=lambda w: -scored[w])[:12]
        if len(top) < 2:
            return ""
        chosen = rng.sample(top, min(len(top), rng.randint(2, 5)))
        if rng.random() < 0.6:
            chosen.sort(key=text.lower().find)
        return " ".join(chosen)

    @staticmethod
    def defined(text: str, rng: random.Random) -> str:
        """Return a question about the subject of a defining sentence, or an empty string."""
        found = [m for s in sentences(text) if (m := DEFINITION.match(s))]
        found = [m for m in found if m.group(1).split()[0].lower() not in PRONOUNS | STOPWORDS]
        if not found:
            return ""
        match = rng.choice(found)
        subject, verb = match.group(1), match.group(2)
        if verb in ("is", "are", "was", "were"):
            return rng.choice([f"what {verb} {subject}?", f"what {verb} {subject}", f"{subject} definition", subject])
        return rng.choice([f"what does {subject} mean?", f"meaning of {subject}", f"define {subject}"])

    def derive(self, source: Source, rng: random.Random) -> tuple[str, list[str]]:
        """Return the passage text (without the sentence that became a query) and one to three queries."""
        queries = []
        text = source.text
        if source.heading and rng.random() < 0.6:
            queries.append(source.heading)
        if rng.random() < 0.6:
            queries.append(self.defined(text, rng))
        if rng.random() < 0.5:
            queries.append(self.keywords(text, rng))
        if not any(queries) or rng.random() < 0.4:
            text, cloze = remove_sentence(text, rng)
            queries.append(cloze)
        return text, [q for q in queries if q]


def sentences(text: str) -> list[str]:
    """Split a passage at sentence ends."""
    return re.split(r"(?<=[.!?]) +(?=[A-Z])", text)


def remove_sentence(text: str, rng: random.Random) -> tuple[str, str]:
    """Return the text without one of its sentences, and a stretch of at most 16 words of that sentence."""
    parts = sentences(text)
    if len(parts) < 3:
        return text, ""
    gone = rng.randrange(len(parts))
    words = parts[gone].split()
    start = rng.randrange(max(1, len(words) - 11))
    rest = " ".join(parts[:gone] + parts[gone + 1 :])
    return rest, " ".join(words[start : start + rng.randint(6, 16)])


def restyle(question: str, rng: random.Random) -> str:
    """Return the question as is, without its question mark, or as the keywords in it."""
    roll = rng.random()
    if roll < 0.55:
        return question
    bare = question.rstrip(" ?.")
    if roll < 0.88:
        return bare
    kept = [w for w in bare.split() if w.lower().strip(",.'\"") not in STOPWORDS]
    return " ".join(kept) if len(kept) >= 2 else bare
