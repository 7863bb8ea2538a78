"""Make tiny-lm: teach a MiniLM-sized decoder to predict queries from passages.

    python recipes/tiny-lm/train.py --data DIR --output out/tiny-lm --start bert --steps 2400

Each step encodes 32 passages once and scores all their queries on top of that one encoding (the key/value cache carries
gradients), so a query costs its own dozen tokens. The loss is the mean negative log-likelihood of the query tokens,
plus that of a sample of the passages' own tokens, so that the model stays a language model.

The order of the data is a function of the seed and the step alone; a checkpoint holds weights and optimiser. Killed at
any point, the same command continues. Progress goes to `log.jsonl` in the output folder.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from passages import QueryMaker, Source, judged_collection, read_jsonl, read_qrels, restyle, textbook, written_passages
from start import STARTS, body_and_head, tokenizer
from torch.nn.functional import cross_entropy

HERE = Path(__file__).parent
COLLECTIONS = ("squad", "wiki-shift", "nq-mini")
# The wording of the package's templates (src/qpeft/templates): before the passage, after it, cue before the query.
PROMPTS = (
    ("Passage:", "", "Question:"),
    ("Passage:", ". Please write a question based on this passage.", "Question:"),
    ("given the hints, please generate a question for the input passage Passage:", "", "Question:"),
)


@dataclass(frozen=True)
class Row:
    """Token ids of one passage with its prompt, and of its queries (cue, query, end), each with a weight."""

    context: list[int]
    queries: list[tuple[list[int], int, float]]


class Encoder:
    """Turns text into token ids; every piece of the prompt is tokenised alone."""

    def __init__(self, passage_tokens: int) -> None:
        self.tokenizer = tokenizer()
        self.passage_tokens = passage_tokens
        self.prompts = [tuple(self.ids(piece) for piece in prompt) for prompt in PROMPTS]

    def ids(self, text: str) -> list[int]:
        """Return a text's token ids, without special tokens."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def row(self, title: str, text: str, queries: list[tuple[str, float]], prompt: int, crop: int) -> Row:
        """Lay out [BOS] before passage after | cue query [EOS]; `crop` passage tokens are cut from the start."""
        before, after, cue = self.prompts[prompt]
        passage = self.ids(f"{title} {text}" if title else text)
        crop = max(0, min(crop, len(passage) - self.passage_tokens))
        passage = passage[crop : crop + self.passage_tokens]
        laid = []
        for query, weight in queries:
            ids = self.ids(query)[:40]
            laid.append((cue + ids + [self.tokenizer.eos_token_id], len(cue), weight))
        return Row([self.tokenizer.bos_token_id, *before, *passage, *after], laid)


@dataclass(frozen=True)
class Corpus:
    """The two streams of training passages: those with written questions, and textbook prose."""

    asked: list[Source]
    prose: list[Source]
    maker: QueryMaker

    @classmethod
    def read(cls, data: Path, questions: Path | None) -> Corpus:
        """Read all sources, without what was written for the recipe if `questions` is None."""
        prose, asked = textbook(data / "openstax", questions)
        for name in COLLECTIONS:
            asked += judged_collection(data / name)
        for path in sorted(questions.glob("part-*.jsonl")) if questions is not None else ():
            asked += written_passages(path)
        return cls(asked, prose, QueryMaker(prose))


def draw(sources: list[Source], start: int, count: int, seed: int) -> Iterator[Source]:
    """Yield items start … start + count of an endless stream of seeded permutations of `sources`."""
    for position in range(start, start + count):
        epoch, offset = divmod(position, len(sources))
        if offset == 0 or position == start:
            order = list(range(len(sources)))
            random.Random(f"{seed}-{epoch}").shuffle(order)
        yield sources[order[offset]]


def make_rows(corpus: Corpus, encoder: Encoder, pool: int, args: argparse.Namespace) -> list[list[Row]]:
    """Return the batches of one pool of steps, passages of similar length together."""
    rng = random.Random(f"{args.seed}-pool-{pool}")
    steps, size = args.pool_steps, args.batch_passages
    asked_count = round(steps * size * args.asked_share)
    prose_count = steps * size - asked_count
    rows = []
    for source in draw(corpus.asked, pool * asked_count, asked_count, args.seed):
        chosen = rng.sample(source.written, min(len(source.written), args.queries_per_passage))
        queries = [(restyle(q, rng), 1.0) for q in chosen]
        title = source.title if rng.random() < 0.7 else ""
        crop = rng.choice([0, 0, 0, 40])
        rows.append(encoder.row(title, source.text, queries, rng.randrange(len(PROMPTS)), crop))
    for source in draw(corpus.prose, pool * prose_count, prose_count, args.seed + 1):
        text, queries = corpus.maker.derive(source, rng)
        title = source.heading if source.heading not in queries and rng.random() < 0.5 else ""
        weighted = [(q, 0.5) for q in queries]
        rows.append(encoder.row(title, text, weighted, rng.randrange(len(PROMPTS)), rng.choice([0, 40])))
    rows.sort(key=lambda row: len(row.context))
    batches = [rows[i : i + size] for i in range(0, len(rows), size)]
    rng.shuffle(batches)
    return batches


def pad(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-pad id lists: ids `[B, T]`, mask `[B, T]`."""
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return ids, mask


def query_losses(
    model: Any, rows: list[Row], pairs: list[tuple[int, list[int]]], prose_share: float, rng: torch.Generator | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Encode each passage once and score queries on it.

    `pairs` are (index of the passage in `rows`, ids of cue, query and end). Returns the negative log-likelihood of
    every target position `[N, K-1]`, its mask, and the mean loss of the sampled passage positions.
    """
    body, head = body_and_head(model)
    ids, mask = pad([row.context for row in rows])
    lengths = mask.sum(1)
    passage = body(input_ids=ids, attention_mask=mask, use_cache=True)
    cache = passage.past_key_values
    owner = torch.tensor([index for index, _ in pairs])
    for layer in cache.layers:
        layer.keys = layer.keys.index_select(0, owner)
        layer.values = layer.values.index_select(0, owner)
    targets, target_mask = pad([target for _, target in pairs])
    states = body(
        input_ids=targets,
        attention_mask=torch.cat([mask[owner], target_mask], 1),
        position_ids=lengths[owner, None] + torch.arange(targets.shape[1]),
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    scored = target_mask[:, 1:].bool()
    nll = torch.zeros(scored.shape)
    nll[scored] = cross_entropy(head(states[:, :-1][scored]).float(), targets[:, 1:][scored], reduction="none")
    prose = torch.zeros(())
    if prose_share:
        sampled = (torch.rand(ids[:, 1:].shape, generator=rng) < prose_share) & mask[:, 1:].bool()
        logits = head(passage.last_hidden_state[:, :-1][sampled])
        prose = cross_entropy(logits.float(), ids[:, 1:][sampled])
    return nll, scored, prose


def training_loss(
    model: Any, rows: list[Row], args: argparse.Namespace, rng: torch.Generator
) -> tuple[torch.Tensor, ...]:
    """Return the loss of a batch, and its query part and prose part for the log."""
    pairs = [(i, ids) for i, row in enumerate(rows) for ids, _, _ in row.queries]
    cue = torch.tensor([length for row in rows for _, length, _ in row.queries])
    weights = torch.tensor([weight for row in rows for _, _, weight in row.queries])
    nll, scored, prose = query_losses(model, rows, pairs, args.prose_positions, rng)
    # The cue is the same everywhere and teaches nothing after the first steps, but UPR's template scores it.
    wanted = scored & (torch.arange(nll.shape[1])[None] >= cue[:, None] - 1)
    weight = weights[:, None] * wanted + 0.05 * (scored & ~wanted)
    query = (nll * weight).sum() / weight.sum()
    return query + args.prose_weight * prose, query.detach(), prose.detach()


class DevSet:
    """Dev questions of the collections with their BM25 candidates: loss on the judged passage, and ranking."""

    def __init__(self, data: Path, encoder: Encoder, queries_per_collection: int, depth: int) -> None:
        import bm25s

        self.encoder = encoder
        self.items: dict[str, list[tuple[str, list[tuple[str, str]], int]]] = {}
        for name in COLLECTIONS:
            folder = data / name
            corpus = read_jsonl(folder / "corpus.jsonl")
            position = {str(row["_id"]): i for i, row in enumerate(corpus)}
            texts = {str(row["_id"]): str(row["text"]) for row in read_jsonl(folder / "queries.jsonl")}
            pairs = read_qrels(folder / "qrels" / "dev.tsv")
            random.Random(7).shuffle(pairs)
            index = bm25s.BM25()
            full = [f"{row['title']} {row['text']}" for row in corpus]
            index.index(bm25s.tokenize(full, stopwords="en", show_progress=False), show_progress=False)
            kept = []
            for query, passage in pairs:
                tokens = bm25s.tokenize([texts[query]], stopwords="en", show_progress=False)
                found = index.retrieve(tokens, k=depth, show_progress=False).documents[0].tolist()
                if position[passage] in found and len(kept) < queries_per_collection:
                    candidates = [(str(corpus[i]["title"]), str(corpus[i]["text"])) for i in found]
                    kept.append((texts[query], candidates, found.index(position[passage])))
            self.items[name] = kept

    @torch.inference_mode()
    def measure(self, model: Any) -> dict[str, float]:
        """Return nats per query token and reciprocal rank at 10, per collection and on average."""
        model.eval()
        result: dict[str, float] = {}
        for name, items in self.items.items():
            losses, ranks = [], []
            for query, candidates, gold in items:
                rows = [self.encoder.row(title, text, [(query, 1.0)], 0, 0) for title, text in candidates]
                target, cue, _ = rows[0].queries[0]
                nll, _, _ = query_losses(model, rows, [(i, target[:-1]) for i in range(len(rows))], 0.0, None)
                mean = nll[:, cue - 1 :].mean(1)
                losses.append(float(mean[gold]))
                rank = int((mean < mean[gold]).sum()) + 1
                ranks.append(1 / rank if rank <= 10 else 0.0)
            result[f"{name} nats"] = sum(losses) / len(losses)
            result[f"{name} RR@10"] = sum(ranks) / len(ranks)
        for kind in ("nats", "RR@10"):
            result[kind] = sum(result[f"{name} {kind}"] for name in self.items) / len(self.items)
        model.train()
        return result


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Linear warm-up, then cosine decay to a twentieth."""
    if step < args.warmup:
        return float(args.lr * (step + 1) / args.warmup)
    progress = (step - args.warmup) / max(1, args.steps - args.warmup)
    return float(args.lr * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress))))


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint beside its place and move it there."""
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def export(model: Any, encoder: Encoder, folder: Path) -> None:
    """Write the model in bf16 in the standard folder form."""
    folder.mkdir(parents=True, exist_ok=True)
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder)
    encoder.tokenizer.save_pretrained(folder)


def optimiser_of(model: Any, args: argparse.Namespace) -> torch.optim.AdamW:
    """AdamW; no decay on embeddings, biases and norms."""
    decay = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if not (p.ndim == 2 and "embed" not in n)]
    groups = [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), fused=True)


def restored(checkpoint: Path, args: argparse.Namespace) -> tuple[Any, torch.optim.AdamW, int]:
    """Return model, optimiser and the number of steps done: from the checkpoint, else an earlier stage, else new."""
    model = STARTS[args.start]()
    optimiser = optimiser_of(model, args)
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        return model, optimiser, int(state["step"])
    if args.initial:
        model.load_state_dict(torch.load(args.initial, weights_only=True)["model"])
    return model, optimiser, 0


def train(args: argparse.Namespace) -> None:
    """Train, measure on dev, keep the latest checkpoint and the exported model."""
    torch.manual_seed(args.seed)
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    (output / "settings.json").write_text(json.dumps(vars(args), indent=2), encoding="utf-8")
    encoder = Encoder(args.passage_tokens)
    corpus = Corpus.read(Path(args.data), None if args.without_written_questions else HERE / "questions")
    dev = DevSet(Path(args.data), encoder, args.dev_queries, args.dev_depth)
    checkpoint = output / "checkpoint.pt"
    model, optimiser, first = restored(checkpoint, args)
    model.train()
    log = (output / "log.jsonl").open("a", encoding="utf-8", buffering=1)
    log.write(json.dumps({"asked": len(corpus.asked), "prose": len(corpus.prose), "from": first}) + "\n")
    batches: list[list[Row]] = []
    started, tokens, sums = time.time(), 0, [0.0, 0.0]
    for step in range(first, args.steps):
        pool, place = divmod(step, args.pool_steps)
        if not batches or place == 0:
            batches = make_rows(corpus, encoder, pool, args)
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, args)
        sampling = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss, query, prose = training_loss(model, batches[place], args, sampling)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        tokens += sum(len(row.context) + sum(len(q) for q, _, _ in row.queries) for row in batches[place])
        sums = [sums[0] + float(query), sums[1] + float(prose)]
        done = step + 1
        if done % args.log_every == 0:
            seconds = time.time() - started
            means = [round(value / args.log_every, 4) for value in sums]
            rates = {"tokens/s": round(tokens / seconds), "seconds": round(seconds)}
            log.write(json.dumps({"step": done, "query": means[0], "prose": means[1], **rates}) + "\n")
            sums = [0.0, 0.0]
        if done % args.save_every == 0 or done == args.steps:
            save(checkpoint, {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "step": done})
        if done % args.dev_every == 0 or done == args.steps:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                measured = dev.measure(model)
            log.write(json.dumps({"step": done, "dev": {k: round(v, 4) for k, v in measured.items()}}) + "\n")
    export(model, encoder, output / "model")


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with openstax/, squad/, wiki-shift/ and nq-mini/")
    parser.add_argument("--output", required=True)
    parser.add_argument("--start", choices=sorted(STARTS), default="bert")
    parser.add_argument("--initial", default="", help="checkpoint of an earlier stage to start from")
    parser.add_argument("--without-written-questions", action="store_true")
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--lr", type=float, default=4e-4)
    parser.add_argument("--warmup", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--batch-passages", type=int, default=32)
    parser.add_argument("--passage-tokens", type=int, default=160)
    parser.add_argument("--queries-per-passage", type=int, default=5)
    parser.add_argument("--asked-share", type=float, default=0.4, help="share of passages that have written questions")
    parser.add_argument("--prose-positions", type=float, default=0.15, help="share of passage tokens in the loss")
    parser.add_argument("--prose-weight", type=float, default=0.3)
    parser.add_argument("--pool-steps", type=int, default=16)
    parser.add_argument("--log-every", type=int, default=20)
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument("--dev-every", type=int, default=200)
    parser.add_argument("--dev-queries", type=int, default=60)
    parser.add_argument("--dev-depth", type=int, default=10)
    return parser.parse_args()


if __name__ == "__main__":
    train(arguments())
