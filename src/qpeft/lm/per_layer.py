"""Models that look a token up again in every layer: Gemma 3n, and of Gemma 4 those of `E` in their names."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def per_layer_inputs(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """Return what such a model is given beside vectors in the place of its tokens `[B, S]`; nothing for others.

    By itself it cannot know the tokens then, and goes without, or ends.
    """
    if not getattr(model.config.get_text_config(), "hidden_size_per_layer_input", 0):
        return {}
    looking_up = next((module for module in model.modules() if hasattr(module, "get_per_layer_inputs")), None)
    return {} if looking_up is None else {"per_layer_inputs": looking_up.get_per_layer_inputs(ids)}
