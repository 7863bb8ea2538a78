"""Templates: the words around a passage and a query, and how they become token ids.

A template is a YAML file with two texts. `context` holds `{passage}` and, where trained vectors may stand, `{hint}`;
`target` holds `{query}`, behind an optional cue. Every literal piece, the passage and the query are tokenised alone and
never merged, so that the tokens of a query are the same behind every passage:

    [BOS] instruction · literal · passage · literal · {hint} · literal | cue · [BOS] · query · [EOS]
                        └────────────────── context ─────────────────┘ └───────── target ────────┘

Without a target, `context` holds `{query}` too, before or behind the passage. Nothing is scored then: what stands at
the last token is read (`end`: that token is EOS).

A decoder reads both as one sequence; an encoder-decoder reads the context with its encoder. White space at the end of a
literal belongs to the piece that follows it, because that is where byte-level tokenizers put it.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from qpeft.errors import FormatError, InputError, OptionError, QueryError, nearest
from qpeft.kept_tokens import KeptTokens
from qpeft.plain_text import PlainText
from qpeft.types import Passage, Query

QuestionMark = Literal["keep", "add", "strip"]


@dataclass(frozen=True)
class Template:
    """The words of a prompt, and which target tokens count in the score."""

    name: str
    version: int
    context: str
    target: str = ""
    passage: str = "{title} {text}"
    description: str = ""
    question_mark: QuestionMark = "keep"
    lowercase: bool = False
    score_cue: bool = False
    score_end: bool = False
    score_begin: bool = False
    """Whether the tokenizer's BOS stands before the query too, and is scored; nothing where it has none."""
    end: bool = False
    """Whether the tokenizer's EOS stands at the end of a context without a target; nothing where it has none."""
    instruction: str = ""
    """Words before the context that no adapter reads, also if it reads the template's other words."""

    def __post_init__(self) -> None:
        if not self.target and "{query}" not in self.context:
            raise InputError(f"template {self.name!r}: missing: target with {{query}}, or {{query}} in the context")
        alone = set() if self.target else {"query"}
        for text, field, wanted, allowed in (
            (self.context, "context", {"passage"} | alone, {"passage", "hint"} | alone),
            (self.target, "target", {"query"} - alone, {"query"}),
            (self.passage, "passage", {"text"}, {"title", "text"}),
        ):
            found = re.findall(r"\{(\w*)\}", text)
            if set(found) - allowed or wanted - set(found) or len(found) != len(set(found)):
                names = " and ".join(f"{{{name}}}" for name in sorted(allowed))
                must = " and ".join(f"{{{name}}}" for name in sorted(wanted))
                raise InputError(f"template {self.name!r}: {field} holds {names}, each at most once; {must} is needed")
        if "{" in self.instruction:
            raise InputError(f"template {self.name!r}: instruction has no places, context holds them")
        if self.target and not self.target.endswith("{query}"):
            raise InputError(f"template {self.name!r}: target must end with {{query}}")
        if self.target and self.end:
            raise InputError(f"template {self.name!r}: end is for a template without a target; score_end scores EOS")
        if self.question_mark not in get_args(QuestionMark):
            raise InputError(f"template {self.name!r}: question_mark is one of {', '.join(get_args(QuestionMark))}")

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that can change a score."""
        facts = {k: v for k, v in dataclasses.asdict(self).items() if k != "description"}
        for younger in ("score_begin", "end", "instruction"):
            if not facts[younger]:
                del facts[younger]  # fingerprints that were made before it are to stay what they are
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def query_text(self, query: Query) -> str:
        """Return the query as the model will read it.

        Raises:
            QueryError: nothing is left of it.
        """
        text = " ".join(query.text.split())
        if self.question_mark != "keep":
            text = text.rstrip(" ?") + ("?" if self.question_mark == "add" else "")
        if not text.strip(" ?"):
            raise QueryError(f"query {query.id!r} is empty")
        return text.lower() if self.lowercase else text

    def passage_text(self, passage: Passage) -> str:
        """Return title and text in the template's order, white space folded."""
        text = re.sub(r"\{(title|text)\}", lambda place: str(getattr(passage, place[1])), self.passage)
        return " ".join(text.split())


def available_templates() -> list[str]:
    """Return the names of the templates that ship with qpeft."""
    return sorted(entry.name[: -len(".yaml")] for entry in _folder().iterdir() if entry.name.endswith(".yaml"))


def load_template(name: str) -> Template:
    """Open a template by its name, or by the path of a YAML file.

    Raises:
        OptionError: neither a known name nor an existing file.
        FormatError: the file is not a template.
    """
    if name in available_templates():
        return _parse(name, (_folder() / f"{name}.yaml").read_text(encoding="utf-8"))
    path = Path(name)
    if path.suffix in (".yaml", ".yml") and path.is_file():
        try:
            return _parse(name, path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise FormatError(name, None, f"cannot be read: {error}") from error
    raise OptionError(f"unknown template {name!r}{nearest(name, available_templates())} (or the path of a .yaml file)")


def _folder() -> Any:
    return resources.files("qpeft") / "templates"


def _parse(path: str, text: str) -> Template:
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise FormatError(path, mark.line + 1 if mark else None, "not valid YAML") from error
    if not isinstance(content, dict):
        raise FormatError(path, None, "a template is a mapping of names to values")
    fields = {field.name: field for field in dataclasses.fields(Template)}
    for key in content:
        if key not in fields:
            raise FormatError(path, None, f"unknown key {key!r}{nearest(str(key), fields)}")
    missing = [n for n, f in fields.items() if f.default is dataclasses.MISSING and n not in content]
    if missing:
        raise FormatError(path, None, f"missing: {', '.join(missing)}")
    for key, value in content.items():
        kind = {"int": int, "bool": bool}.get(str(fields[key].type), str)
        if type(value) is not kind:  # True is an int
            raise FormatError(path, None, f"{key} must be a {kind.__name__}, not {value!r}")
    try:
        return Template(**content)
    except InputError as error:
        raise FormatError(path, None, str(error)) from error


@dataclass(frozen=True, slots=True)
class Row:
    """Token ids of one (query, passage) pair.

    `context` and `target` are ids; `scored` says which target tokens count; `passage` is the span of the passage in
    `context`; `hint` is the place in `context` where trained vectors would stand, if the template has one; `query` are
    the ids that an adapter reads as the query; `body` is where `context` begins behind BOS and instruction. A row
    without a target is read at its last token.
    """

    context: tuple[int, ...]
    target: tuple[int, ...]
    scored: tuple[bool, ...]
    passage: tuple[int, int]
    hint: int | None
    query: tuple[int, ...] = ()
    truncated: bool = False
    body: int = 0

    def __len__(self) -> int:
        return len(self.context) + len(self.target)

    def read(self, *, template: bool, states: bool) -> tuple[int, int]:
        """Return the span of `context` that an adapter reads as the passage.

        Args:
            template: the words around it count too, except an instruction (as in the authors' code of arXiv 2404.04522:
                the document with the cue behind it).
            states: it reads states of the passage as well, which there are before the hint alone.
        """
        if not template:
            return self.passage
        return self.body, len(self.context[: self.hint] if states else self.context)


class Prompt:
    """A template bound to a tokenizer and to a budget in tokens.

    Args:
        template: the words.
        tokenizer: a Hugging Face tokenizer.
        max_length: tokens that context and target may have together (for encoder-decoders: each).
        max_passage_tokens: further bound on the passage.
        hint_length: vectors that an adapter writes for a query of so many tokens; room is kept for them.
        separate_target: the model has an encoder, which reads the context alone.
        kept: where tokens of passages are kept for the next query; by default a store of its own.
    """

    def __init__(
        self,
        template: Template,
        tokenizer: Any,
        max_length: int,
        *,
        max_passage_tokens: int | None = None,
        hint_length: Callable[[int], int] | None = None,
        separate_target: bool = False,
        kept: KeptTokens | None = None,
    ) -> None:
        if hint_length is not None and hint_length(1) and "{hint}" not in template.context:
            raise OptionError(f"template {template.name!r} has no place for a hint: {{hint}} is missing in its context")
        self.template = template
        self.max_length = max_length
        self._tokenizer, self._plain = tokenizer, PlainText(tokenizer)
        self._separate = separate_target
        self.max_passage_tokens = max_passage_tokens
        self._hint_length = hint_length
        self._kept = kept or KeptTokens()
        self._target = functools.lru_cache(256)(self._tokenize_target)  # its own, so that it goes with the prompt
        marked = tokenizer.convert_ids_to_tokens(tokenizer("a", add_special_tokens=False)["input_ids"])
        self._adds_space = bool(marked) and marked[0].startswith("▁")
        self._context, spaced, self._blank = self._context_pieces()
        self._spaced_passage, self._spaced_query = spaced["{passage}"], spaced.get("{query}", False)
        self._fixed = sum(len(piece) for piece in self._context if isinstance(piece, tuple))
        self._cue: list[int] = []
        if template.target:
            self._cue, self._spaced_query = self._literal(template.target[: -len("{query}")], previous=self._blank)
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self._begin = [bos] if template.score_begin and bos is not None else []
        self._end = [eos] if template.score_end and eos is not None else []

    def rows(
        self,
        query: Query,
        passage: Passage,
        *,
        windows: int = 0,
        overlap: int = 0,
        hint_query: Query | None = None,
        max_passage_tokens: int | None = None,
    ) -> list[Row]:
        """Return the pair as one row, or, with `windows`, as one row per window of the passage.

        Args:
            query: never cut.
            passage: cut at its end where it does not fit.
            windows: tokens of the passage in each window, or as many as fit; 0: no windows.
            overlap: tokens that consecutive windows share.
            hint_query: what an adapter reads instead of the query (a control: hints that belong to another query).
            max_passage_tokens: a bound on this passage, beside that of the prompt; without windows.

        Raises:
            QueryError: the query is empty, or leaves no room for a passage.
        """
        target, scored, own = self._target(query)
        read = own if hint_query is None else self._target(hint_query)[2]
        room = self._room(query, len(target) + (self._hint_length(len(read)) if self._hint_length else 0))
        ids = self._passage_ids(passage)

        def row(some: tuple[int, ...], truncated: bool) -> Row:
            context: list[int] = []
            places: dict[str, int] = {}
            for piece in self._context:
                if isinstance(piece, str):
                    places[piece] = len(context)
                    piece = {"{passage}": some, "{query}": own}.get(piece, ())
                context += piece
            start = places["{passage}"]
            span, hint = (start, start + len(some)), places.get("{hint}")
            return Row(tuple(context), target, scored, span, hint, read, truncated, self._body)

        if not windows:
            room = min(room, max_passage_tokens or room)
            return [row(ids[:room], len(ids) > room)]
        width = min(room, windows)
        if width <= overlap:
            raise OptionError(f"query {query.id!r}: windows of {width} tokens cannot overlap by {overlap}")
        starts = range(0, max(1, len(ids) - overlap), width - overlap)
        return [row(ids[start : start + width], False) for start in starts]

    def cut(self, max_passage_tokens: int) -> Prompt:
        """Return the same prompt with passages cut to so many tokens, or fewer where it cuts them to fewer."""
        shorter = copy.copy(self)
        shorter.max_passage_tokens = min(max_passage_tokens, self.max_passage_tokens or max_passage_tokens)
        return shorter

    def read_ahead(self, passages: Iterable[Passage]) -> None:
        """Tokenise passages together, which the tokenizer does on all cores."""
        lead = self._lead(self._spaced_passage)

        def tokenize(texts: list[str]) -> list[list[int]]:
            return self._plain([lead + text for text in texts])

        self._kept.read_ahead(map(self.template.passage_text, passages), self._spaced_passage, tokenize)

    def following(self, text: str) -> tuple[int, ...]:
        """Return the tokens of a text that stands right behind the context."""
        return tuple(self._ids(text, space=bool(self._blank)))

    def _passage_ids(self, passage: Passage) -> tuple[int, ...]:
        text = self.template.passage_text(passage)
        if not text:
            return ()
        return self._kept.get(text, self._spaced_passage, lambda: self._plain_ids(text, space=self._spaced_passage))

    def _tokenize_target(self, query: Query) -> tuple[tuple[int, ...], tuple[bool, ...], tuple[int, ...]]:
        """Return the ids after the context, which of them are scored, and those of the query alone."""
        ids = self._plain_ids(self.template.query_text(query), space=self._spaced_query)
        if not ids:
            raise QueryError(f"query {query.id!r} has no tokens: {query.text!r}")
        if not self.template.target:
            return (), (), tuple(ids)
        counted = [*self._begin, *ids, *self._end]
        scored = [self.template.score_cue] * len(self._cue) + [True] * len(counted)
        return (*self._cue, *counted), tuple(scored), tuple(ids)

    def _room(self, query: Query, target: int) -> int:
        fixed = self._fixed + (0 if self.template.target else len(self._target(query)[2]))
        used = max(fixed, target) if self._separate else fixed + target
        if used >= self.max_length:
            raise QueryError(
                f"query {query.id!r} needs {used} tokens with its template, which leaves no room for a passage; "
                f"the limit is {self.max_length} (a query is never cut)"
            )
        room = self.max_length - (fixed if self._separate else used)
        return room if self.max_passage_tokens is None else min(room, self.max_passage_tokens)

    def _context_pieces(self) -> tuple[list[tuple[int, ...] | str], dict[str, bool], str]:
        """Tokenise the literals of the context.

        Return its pieces in order, literals as ids and places under their names; whether a space stands before a place;
        and the blank that the target begins with.
        """
        found: list[tuple[int, ...] | str] = []
        before: dict[str, bool] = {}
        bos, eos = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
        if bos is not None and not self._separate:
            found.append((bos,))
        spaced = False
        if self.template.instruction:
            ids, _ = self._literal(self.template.instruction, previous="")
            found.append(tuple(ids))
            spaced = True
        self._body = sum(map(len, found))
        for piece in re.split(r"(\{passage\}|\{hint\}|\{query\})", self.template.context):
            if re.fullmatch(r"\{\w+\}", piece):
                if piece == "{passage}" and found[-1:] == ["{hint}"]:
                    raise InputError(
                        f"template {self.template.name!r}: a hint before the passage needs text between them"
                    )
                found.append(piece)
                before[piece] = spaced
                spaced = spaced and piece == "{hint}"
            elif piece:
                ids, spaced = self._literal(piece, previous=" " if spaced else "")
                found += [tuple(ids)] if ids else []
        if eos is not None and (self._separate or self.template.end):
            found.append((eos,))
        closed = self._separate or self.template.end
        return found, before, " " if spaced and not closed else ""

    def _literal(self, text: str, previous: str) -> tuple[list[int], bool]:
        """Tokenise a literal without the blanks at its end; say whether there were any."""
        text = previous + text
        bare = text.rstrip(" ")
        return (self._ids(bare.lstrip(" "), space=bare.startswith(" ")) if bare else []), bare != text

    def _lead(self, space: bool) -> str:
        return " " if space and not self._adds_space else ""

    def _plain_ids(self, text: str, *, space: bool) -> list[int]:
        return self._plain([self._lead(space) + text])[0]

    def _ids(self, text: str, *, space: bool) -> list[int]:
        return list(self._tokenizer(self._lead(space) + text, add_special_tokens=False, verbose=False)["input_ids"])
