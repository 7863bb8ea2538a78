"""Third stage of tiny-lm: learn to prefer the passage that a query is about over passages much like it.

    python recipes/tiny-lm/rank.py --data DIR --output out/tiny-lm/third --initial FOLDER

A step takes a few clusters. A cluster is a passage with seven passages like it (by MiniLM's embeddings, or by BM25 for one
of its questions) and queries of all of them; every query is scored on every passage of its cluster in one forward
pass, in which a row holds a passage and, behind it, all queries, none of which sees another. The loss is

    cross-entropy of softmax_d( log P(q | d) ) with a target distribution over the cluster
  + negative log-likelihood of the queries on their own passages + that of a sample of the passages' tokens.

The target distribution mixes the judged passage with the softmax of MiniLM's cosines: a sentence encoder that was
trained on a billion pairs knows which of the other passages fit as well.

As in `train.py`, the order of the data is a function of seed and step; killed, the same command continues.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bm25s
import numpy as np
import torch
from passages import restyle
from start import body_and_head, encoder_folder
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax, one_hot
from train import HERE, PROMPTS, Corpus, DevSet, Encoder, export, learning_rate, optimiser_of, pad, restored, save


@dataclass(frozen=True)
class Question:
    """A query, the place of its own passage in the cluster, and how far the label is trusted over the teacher."""

    text: str
    place: int
    label: float


@dataclass(frozen=True)
class Cluster:
    """Passages that are alike: token ids with their prompt, their embeddings `[size, 384]`, and their queries."""

    contexts: list[list[int]]
    vectors: Tensor
    questions: list[Question]


class Neighbours:
    """Passages with their MiniLM embeddings and a BM25 index; makes clusters."""

    def __init__(self, corpus: Corpus, encoder: Encoder, args: argparse.Namespace) -> None:
        from sentence_transformers import SentenceTransformer

        self.args = args
        self.encoder = encoder
        self.maker = corpus.maker
        self.sources = corpus.asked + random.Random(args.seed).sample(corpus.prose, args.prose)
        self.asked = len(corpus.asked)
        self.teacher = SentenceTransformer(str(encoder_folder()), device="cpu")
        texts = [f"{s.title} {s.text}".strip() for s in self.sources]
        self.vectors = self.embed(texts)
        self.index = bm25s.BM25()
        self.index.index(bm25s.tokenize(texts, stopwords="en", show_progress=False), show_progress=False)

    def embed(self, texts: list[str]) -> Tensor:
        """Return unit vectors `[N, 384]`."""
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = self.teacher.encode(texts, batch_size=64, normalize_embeddings=True, convert_to_numpy=True)
        return torch.from_numpy(np.asarray(found, dtype=np.float32))

    def alike(self, seed: int, rng: random.Random) -> list[int]:
        """Return the indices of a passage and of passages like it."""
        if rng.random() < 0.5:
            question = restyle(rng.choice(self.sources[seed].written), rng)
            tokens = bm25s.tokenize([question], stopwords="en", show_progress=False)
            near = self.index.retrieve(tokens, k=25, show_progress=False).documents[0].tolist()
        else:
            near = (self.vectors @ self.vectors[seed]).topk(25).indices.tolist()
        return [seed, *rng.sample([i for i in near if i != seed], self.args.cluster_size - 1)]

    def clusters(self, step: int) -> list[Cluster]:
        """Return the clusters of a step."""
        rng = random.Random(f"{self.args.seed}-step-{step}")
        found = []
        for position in range(step * self.args.clusters, (step + 1) * self.args.clusters):
            epoch, offset = divmod(position, self.asked)
            order = list(range(self.asked))
            random.Random(f"{self.args.seed}-{epoch}").shuffle(order)
            found.append(self._cluster(self.alike(order[offset], rng), rng))
        return found

    def _cluster(self, members: list[int], rng: random.Random) -> Cluster:
        prompt = rng.randrange(len(PROMPTS))
        contexts, questions = [], []
        for place, index in enumerate(members):
            source = self.sources[index]
            text, title = source.text, source.title if rng.random() < 0.7 else ""
            if source.written:
                chosen = rng.sample(source.written, min(len(source.written), 2 if place else 4))
                questions += [Question(restyle(q, rng), place, 0.7) for q in chosen]
            elif rng.random() < 0.5:
                text, derived = self.maker.derive(source, rng)
                title = "" if title in derived else title
                questions += [Question(q, place, 0.3) for q in derived[:1]]
            contexts.append(self.encoder.row(title, text, [], prompt, rng.choice([0, 0, 0, 40])).context)
        kept = questions[:1] + rng.sample(questions[1:], min(len(questions), self.args.queries) - 1)
        return Cluster(contexts, self.vectors[members], kept)


def visibility(mask: Tensor, tail: Tensor, queries: int) -> Tensor:
    """Return who sees whom `[B, 1, T, T]`: passages causally, each query its passage and itself.

    Args:
        mask: `[B, W]`, which passage positions are tokens.
        tail: `[B, queries * K]`, which positions behind the passage are tokens.
        queries: blocks behind the passage.
    """
    width, rest = mask.shape[1], tail.shape[1]
    size = rest // queries
    seen = torch.zeros(len(mask), 1, width + rest, width + rest, dtype=torch.bool)
    seen[:, 0, :width, :width] = torch.ones(width, width, dtype=torch.bool).tril() & mask[:, None].bool()
    seen[:, 0, width:, :width] = mask[:, None].bool()
    blocks = torch.block_diag(*[torch.ones(size, size).tril()] * queries).bool()
    seen[:, 0, width:, width:] = blocks & tail[:, None].bool()
    return seen | torch.eye(width + rest, dtype=torch.bool)


def scores(model: Any, encoder: Encoder, clusters: list[Cluster], prose: float, rng: torch.Generator) -> Any:
    """Score every query on every passage of its cluster.

    Returns:
        per cluster, log-probabilities of cue (without its first token), query and end `[size, q, K-1]` and which of them
        are tokens `[q, K-1]`; and the mean loss of a share `prose` of the passages' tokens.
    """
    body, head = body_and_head(model)
    size = len(clusters[0].contexts)
    ids, mask = pad([context for cluster in clusters for context in cluster.contexts])
    cue, end = encoder.prompts[0][2], encoder.tokenizer.eos_token_id
    targets, target_mask = pad([[*cue, *encoder.ids(q.text)[:40], end] for c in clusters for q in c.questions])
    width, k = ids.shape[1], targets.shape[1]
    most = max(len(cluster.questions) for cluster in clusters)
    tail, tail_mask = torch.zeros(2, len(ids), most, k, dtype=torch.long)
    first, spans = 0, []
    for number, cluster in enumerate(clusters):
        own = slice(first, first := first + len(cluster.questions))
        rows = slice(number * size, (number + 1) * size)
        tail[rows, : len(cluster.questions)] = targets[own]
        tail_mask[rows, : len(cluster.questions)] = target_mask[own]
        spans.append((own, rows))
    positions = mask.sum(1)[:, None] + torch.arange(k).repeat(most)
    states = body(
        input_ids=torch.cat([ids, tail.flatten(1)], 1),
        attention_mask=visibility(mask, tail_mask.flatten(1), most),
        position_ids=torch.cat([torch.arange(width).expand(len(ids), -1), positions], 1),
        use_cache=False,
    ).last_hidden_state
    behind = states[:, width:].unflatten(1, (most, k))
    results = []
    for own, rows in spans:
        which = target_mask[own, 1:].bool()
        each = which.expand(size, -1, -1)
        logits = head(behind[rows, : len(which), :-1][each]).float()
        values = torch.zeros(each.shape)
        values[each] = -cross_entropy(logits, targets[own, 1:].expand(size, -1, -1)[each], reduction="none")
        results.append((values, which))
    sampled = (torch.rand(mask[:, 1:].shape, generator=rng) < prose) & mask[:, 1:].bool()
    predicted = head(states[:, : width - 1][sampled])
    return results, cross_entropy(predicted.float(), ids[:, 1:][sampled])


def losses(model: Any, near: Neighbours, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the ranking, query and prose losses of a step."""
    args = near.args
    clusters = near.clusters(step)
    rng = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
    results, prose = scores(model, near.encoder, clusters, args.prose_positions, rng)
    cue = len(near.encoder.prompts[0][2])
    ranking, query = [], []
    for cluster, (values, which) in zip(clusters, results, strict=True):
        gold = torch.tensor([q.place for q in cluster.questions])
        label = torch.tensor([[q.label] for q in cluster.questions])
        counted = which.clone()
        counted[:, : cue - 1] = False
        own = values[gold, torch.arange(len(gold))]
        query.append((own * counted).sum() / counted.sum())
        # The end token is learned too, but is not part of a query's likelihood.
        ranked = counted.clone()
        ranked[torch.arange(len(gold)), which.sum(1) - 1] = False
        cosines = near.embed([q.text for q in cluster.questions]) @ cluster.vectors.T
        target = label * one_hot(gold, len(values)) + (1 - label) * (cosines / args.temperature).softmax(1)
        ranking.append((target * log_softmax((values * ranked).sum(2).T, 1)).sum(1))
    return -torch.cat(ranking).mean(), -torch.stack(query).mean(), prose


def train(args: argparse.Namespace) -> None:
    """Train, measure on dev, keep the latest checkpoint and the exported model."""
    torch.manual_seed(args.seed)
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    encoder = Encoder(args.passage_tokens)
    corpus = Corpus.read(Path(args.data), HERE / "questions")
    near = Neighbours(corpus, encoder, args)
    dev = DevSet(Path(args.data), encoder, args.dev_queries, args.dev_depth)
    checkpoint = output / "checkpoint.pt"
    model, optimiser, first = restored(checkpoint, args)
    model.train()
    log = (output / "log.jsonl").open("a", encoding="utf-8", buffering=1)

    def measure(step: int) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            measured = dev.measure(model)
        log.write(json.dumps({"step": step, "dev": {k: round(v, 4) for k, v in measured.items()}}) + "\n")

    log.write(json.dumps({"asked": near.asked, "passages": len(near.sources), "from": first}) + "\n")
    if first == 0:
        measure(0)
    started, sums = time.time(), torch.zeros(3)
    for step in range(first, args.steps):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, args)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            parts = losses(model, near, step)
            loss = args.rank_weight * parts[0] + parts[1] + args.prose_weight * parts[2]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        sums += torch.stack([part.detach() for part in parts])
        done = step + 1
        if done % args.log_every == 0:
            means = dict(zip(("ranking", "query", "prose"), (sums / args.log_every).tolist(), strict=True))
            rounded = {name: round(value, 4) for name, value in means.items()}
            log.write(json.dumps({"step": done, **rounded, "seconds": round(time.time() - started)}) + "\n")
            sums.zero_()
        if done % args.save_every == 0 or done == args.steps:
            save(checkpoint, {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "step": done})
        if done % args.dev_every == 0 or done == args.steps:
            measure(done)
            export(model, encoder, output / "model")


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with openstax/, squad/, wiki-shift/ and nq-mini/")
    parser.add_argument("--output", required=True)
    parser.add_argument("--initial", required=True, help="checkpoint or model folder of the second stage")
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--warmup", type=int, default=40)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--clusters", type=int, default=4, help="clusters in a step")
    parser.add_argument("--cluster-size", type=int, default=8, help="passages in a cluster")
    parser.add_argument("--queries", type=int, default=10, help="queries of a cluster, at most")
    parser.add_argument("--prose", type=int, default=12_000, help="textbook passages without questions to draw on")
    parser.add_argument("--temperature", type=float, default=0.05, help="of the teacher's cosines")
    parser.add_argument("--rank-weight", type=float, default=1.0)
    parser.add_argument("--prose-weight", type=float, default=0.2)
    parser.add_argument("--prose-positions", type=float, default=0.05, help="share of passage tokens in the loss")
    parser.add_argument("--passage-tokens", type=int, default=160)
    parser.add_argument("--log-every", type=int, default=10)
    parser.add_argument("--save-every", type=int, default=50)
    parser.add_argument("--dev-every", type=int, default=225)
    parser.add_argument("--dev-queries", type=int, default=60)
    parser.add_argument("--dev-depth", type=int, default=20)
    return parser.parse_args()


if __name__ == "__main__":
    train(arguments())
