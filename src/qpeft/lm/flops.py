"""Floating-point operations of a forward pass, counted from the shapes of a model's weights.

A multiply-add counts as two. Counted are the matrix products that the result needs: the linear layers for every token
that goes through them, of experts only those that a token is sent to, the head where something is predicted, and
attention between a token and what it attends to (itself and what stands before it, as far as a sliding window reaches).
Kernels may compute more, such as scores that are masked afterwards. Not counted: padding, norms, activations, look-ups,
and what an adapter computes itself (its hint vectors are tokens like others, once they stand in the input).

The idea is that of E2R-FLOPs (Peng et al. 2025, arXiv 2507.06223): work in FLOPs does not depend on the hardware. Its
published estimator leaves out the head and the third matrix of gated MLPs, and lets every token attend to all, so its
numbers are not comparable with these.

A row is a pair of numbers: tokens that are computed, and tokens before them whose keys and values are there already.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from qpeft.lm.depth import find_layers

_INTO_ATTENTION = re.compile(r"(^|[._])(q|k|v|qkv)(_proj)?$|query|key|value|c_attn$")
_CROSS = re.compile(r"EncDecAttention|encoder_attn|crossattention", re.IGNORECASE)
_OF_CONTEXT = re.compile(r"(^|[._])(k|v)(_proj)?$|key|value")


@dataclass(frozen=True, slots=True)
class LayerShape:
    """Work of one layer, in multiply-adds.

    Attributes:
        weights: for a token, in the linear layers.
        into_attention: the part of `weights` that makes queries, keys and values; all of them where it is not known.
        width: for a token and one that it attends to, in the scores; the weighted sum takes as many.
        window: tokens that a token attends to at most.
        cross_weights: for a token of the encoder, whose keys and values this layer of a decoder makes.
    """

    weights: int
    into_attention: int
    width: int
    window: int | None = None
    cross_weights: int = 0


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Layers of a decoder, multiply-adds of its head for a predicted token, layers of an encoder if there is one."""

    layers: tuple[LayerShape, ...]
    head: int
    encoder: tuple[LayerShape, ...] = ()


@dataclass(slots=True)
class Computed:
    """What went through a model since it was opened.

    `tokens` are those of rows and of contexts that were not encoded already, hint vectors included; `padding` are
    positions beside them; `flops` do without padding, and are None for a model whose shape is not understood.
    """

    tokens: int = 0
    padding: int = 0
    flops: int | None = 0

    def add(self, tokens: int, padding: int, flops: int | None) -> None:
        """Add one forward pass."""
        self.tokens += tokens
        self.padding += padding
        self.flops = None if self.flops is None or flops is None else self.flops + flops


def decoder_flops(
    shape: ModelShape,
    rows: Sequence[tuple[int, int]],
    predicted: int,
    depth: int | None = None,
    ends: Sequence[int] | None = None,
) -> int:
    """Return the FLOPs of a decoder.

    Args:
        shape: of the model.
        rows: see above.
        predicted: tokens that the head predicts, of all rows together.
        depth: only the first so many layers are run.
        ends: with how many tokens at the end of each row the last layer goes on behind its keys and values.
    """
    layers: Sequence[LayerShape] = shape.layers[:depth]
    work = predicted * shape.head
    if ends is not None:
        *layers, last = layers
        places = [(end, before + computed - end) for (computed, before), end in zip(rows, ends, strict=True)]
        work += sum(computed for computed, _ in rows) * last.into_attention + _decoder([last], places)
    return 2 * (_decoder(layers, rows) + work)


def context_flops(shape: ModelShape, tokens: int, depth: int | None = None) -> int:
    """Return the FLOPs of encoding a context up to the last layer's keys and values.

    Args:
        shape: of the model.
        tokens: of the context.
        depth: only the first so many layers are run.
    """
    *whole, last = shape.layers[:depth]
    return 2 * (_decoder(whole, [(tokens, 0)]) + tokens * last.into_attention)


def encoder_decoder_flops(shape: ModelShape, rows: Sequence[tuple[int, int]]) -> int:
    """Return the FLOPs of an encoder-decoder that predicts every token of its targets.

    Args:
        shape: of the model.
        rows: tokens of the context and of the target.
    """
    contexts, targets = sum(context for context, _ in rows), sum(target for _, target in rows)
    encoder = sum(
        contexts * layer.weights + 2 * layer.width * sum(context**2 for context, _ in rows) for layer in shape.encoder
    )
    cross = sum(
        contexts * layer.cross_weights + 2 * layer.width * sum(context * target for context, target in rows)
        for layer in shape.layers
    )
    decoder = _decoder(shape.layers, [(target, 0) for _, target in rows])
    return 2 * (encoder + cross + decoder + targets * shape.head)


def attended(tokens: int, before: int = 0, window: int | None = None) -> int:
    """Return with how many tokens those of a row are compared: each with itself and all before it, within a window."""
    growing = tokens if window is None else min(tokens, max(0, window - before))
    full = 0 if window is None else (tokens - growing) * window
    return growing * before + growing * (growing + 1) // 2 + full


def _decoder(layers: Sequence[LayerShape], rows: Sequence[tuple[int, int]]) -> int:
    tokens = sum(computed for computed, _ in rows)
    pairs = {
        window: sum(attended(computed, before, window) for computed, before in rows)
        for window in {layer.window for layer in layers}
    }
    return sum(tokens * layer.weights + 2 * layer.width * pairs[layer.window] for layer in layers)


def shape_of(model: nn.Module) -> ModelShape | None:
    """Return the shape of a causal or encoder-decoder model of the transformers library.

    None where it is not understood: no single list of layers, no attention heads, heads that differ from layer to
    layer, or experts without a number of those that a token is sent to.
    """
    if not isinstance(model, PreTrainedModel):
        return None
    opened: Any = model
    try:
        if not opened.config.is_encoder_decoder:
            return ModelShape(_layer_shapes(opened), _head(opened))
        encoder, decoder = _layer_shapes(opened.get_encoder()), _layer_shapes(opened.get_decoder())
        return ModelShape(decoder, _head(opened), encoder)
    except Exception:  # whatever a configuration raises that tells shapes in another way, such as layer by layer
        return None


def _layer_shapes(stack: Any) -> tuple[LayerShape, ...]:
    config = stack.config.get_text_config()
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    layers = find_layers(stack).modules
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * len(layers)
    return tuple(
        _layer_shape(layer, width, window if kind == "sliding_attention" else None, config)
        for layer, kind in zip(layers, kinds, strict=True)
    )


def _layer_shape(layer: nn.Module, width: int, window: int | None, config: Any) -> LayerShape:
    sizes = dict(_matrices(layer, config))
    cross = {path for path in sizes if _CROSS.search(path) and _OF_CONTEXT.search(path)}
    own = {path: size for path, size in sizes.items() if path not in cross}
    weights = sum(own.values())
    into = sum(size for path, size in own.items() if _INTO_ATTENTION.search(path) and not _CROSS.search(path))
    return LayerShape(weights, into or weights, width, window, sum(sizes[path] for path in cross))


def _matrices(root: nn.Module, config: Any) -> Iterator[tuple[str, int]]:
    """Yield the paths of what holds matrices, without those of LoRA, and the multiply-adds that a token takes there."""
    for path, module in root.named_modules():
        if isinstance(module, nn.Embedding) or ".lora_" in path:
            continue
        size = 0
        if isinstance(module, nn.Linear):
            size = module.in_features * module.out_features  # quantised weights are packed, so not their own number
        else:
            for parameter in module.parameters(recurse=False):
                if parameter.ndim == 2:
                    size += parameter.numel()
                elif parameter.ndim == 3:  # experts, stacked
                    size += parameter.numel() // len(parameter) * config.num_experts_per_tok
        if size:
            yield path.replace(".base_layer", ""), size


def _head(model: Any) -> int:
    """Return the multiply-adds of everything that stands behind the base model, such as BERT's transform."""
    base = model.base_model
    if base is model:
        return sum(size for _, size in _matrices(model.get_output_embeddings(), model.config))
    after = (child for child in model.children() if child is not base)
    return sum(size for child in after for _, size in _matrices(child, model.config))
