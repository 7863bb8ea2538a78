"""What trained adapters write, computed again from their numbers alone: one pair, float64, loops, no code of theirs.

Vectors are float64 `[d]` and lists of them. `w` are an adapter's tensors by name, `config` its options.
"""

from __future__ import annotations

import torch
from torch.nn import functional


class Tables:
    """The vectors of tokens: frozen, as they enter the model's layers, and those of a trained copy if there is one."""

    def __init__(self, lm, w):
        ids = torch.arange(lm.embeddings.weight.shape[0])
        self.frozen = lm.embeddings(ids).detach().double()
        self.trained = w.get("token_table", self.frozen)
        self.rms = self.frozen.pow(2).mean().sqrt()
        self._tokenizer = lm.tokenizer

    def words(self, text):
        ids = self._tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
        return [self.trained[i] for i in ids]


def numbers(adapter):
    return {name: tensor.detach().double() for name, tensor in adapter.state_dict().items()}


def affine(w, name, x):
    y = w[f"{name}.weight"] @ x
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def network(w, init, rms, z):
    """Return what the network makes of one vector."""
    steps = sorted({int(name.split(".")[2]) for name in w if name.startswith("network.steps.")})
    if not steps:
        return z
    x = z / rms if init == "residual_zero" else z
    for step in steps:
        x = affine(w, f"network.steps.{step}", x)
        if step != steps[-1]:
            x = torch.clamp(x, min=0.0)
    return z + rms * x if init == "residual_zero" else x


def softmax(logits):
    powers = [torch.exp(x - max(logits)) for x in logits]
    return [p / sum(powers) for p in powers]


def mean_of(weighted):
    return [sum(column) / len(column) for column in zip(*weighted, strict=True)]


def cosine_attention(w, heads, sharpness, tables, readers, passage, states):
    """Return what each reader reads, and its weights, the heads' mean."""
    centre = functional.normalize(tables.frozen, dim=1).mean(0)
    size = len(w["attention.query"]) // heads
    read, shares = [], []
    for reader in readers:
        q = w["attention.query"] @ (reader / reader.norm() - centre)
        per_head, low_rank = [], []
        for h in range(heads):
            part = slice(h * size, (h + 1) * size)
            logits, values = [], []
            for j, x in enumerate(passage):
                k, v = w["attention.key"] @ (x / x.norm() - centre), w["attention.value.weight"] @ x / tables.rms
                if states is not None:
                    c = (states[j] - states[j].mean()) / (states[j].var(unbiased=False) + 1e-5).sqrt()
                    k, v = k + w["attention.context_key.weight"] @ c, v + w["attention.context_value.weight"] @ c
                logits.append(sharpness * (q[part] @ k[part]))
                values.append(v[part])
            weights = softmax(logits)
            per_head.append(weights)
            low_rank.append(sum(a * v for a, v in zip(weights, values, strict=True)))
        share = mean_of(per_head)
        inside = sum(a * x for a, x in zip(share, passage, strict=True))
        read.append(inside + tables.rms * (w["attention.out.weight"] @ torch.cat(low_rank)))
        shares.append(share)
    return read, shares


def default_attention(w, heads, readers, passage):
    """Return what multi-head attention reads (arXiv 1706.03762, section 3.2.2), and its weights, the heads' mean."""
    weight, bias = w["attention.attention.in_proj_weight"].chunk(3), w["attention.attention.in_proj_bias"].chunk(3)
    keys, values = ([weight[part] @ x + bias[part] for x in passage] for part in (1, 2))
    size = len(bias[0]) // heads
    read, shares = [], []
    for reader in readers:
        q = weight[0] @ reader + bias[0]
        per_head, content = [], []
        for h in range(heads):
            part = slice(h * size, (h + 1) * size)
            weights = softmax([q[part] @ k[part] / size**0.5 for k in keys])
            per_head.append(weights)
            content.append(sum(a * v[part] for a, v in zip(weights, values, strict=True)))
        read.append(affine(w, "attention.attention.out_proj", torch.cat(content)))
        shares.append(mean_of(per_head))
    return read, shares


def naive_qpeft_a(w, config, tables, query, passage, states):
    """Return the vectors of Q-PEFT-A or -C (arXiv 2404.04522), and the weights."""
    readers, content = [tables.trained[i] for i in query], [tables.frozen[i] for i in passage]
    if config.attn_init == "default":
        read, shares = default_attention(w, config.num_heads, readers, content)
    else:
        read, shares = cosine_attention(w, config.num_heads, config.attn_sharpness, tables, readers, content, states)
    vectors = [*tables.words(config.hint_prefix), *read, *tables.words(config.hint_suffix)]
    return [network(w, config.mlp_init, tables.rms, z) for z in vectors], shares


def naive_qpeft_r(w, config, tables, query, passage, states):
    """Return the vectors of Q-PEFT-R with each token once, and the places of what it chose."""
    asked = tables.trained if config.similarity_table == "trainable" else tables.frozen
    best = {}
    for place, token in enumerate(passage):
        near = [functional.cosine_similarity(asked[i], tables.frozen[token], dim=0) for i in query]
        if token not in {passage[before] for before in best}:
            best[place] = round(float(max(near)), 4)  # ties are ties, and the earliest comes first
    chosen = sorted(best, key=lambda place: -best[place])[: config.k]
    words = [tables.trained[passage[place]] for place in chosen]
    vectors = [*tables.words(config.hint_prefix), *words, *tables.words(config.hint_suffix)]
    return [network(w, config.mlp_init, tables.rms, z) for z in vectors], chosen


def naive_passage_prompt(w, config, tables, query, passage, states):
    """Return the vectors of the passage prompt: its instruction, then what the passage alone gives."""
    content, shares = [tables.frozen[i] for i in passage], None
    if config.form == "attend":
        readers = [tables.rms * reader for reader in w["readers"]]
        content, shares = cosine_attention(w, config.num_heads, 10.0, tables, readers, content, None)
    before = [tables.rms * vector for vector in w["instruction"]]
    return before + [network(w, "residual_zero", tables.rms, z) for z in content], shares


def naive_soft_prompt(w, config, tables, query, passage, states):
    """Return the trained vectors."""
    return [tables.rms * vector for vector in w["vectors"]], None
