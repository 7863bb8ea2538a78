"""Choices that several adapters offer; apart from the code behind them, so that they can be listed without torch."""

from __future__ import annotations

from typing import Literal

Init = Literal["residual_zero", "default"]
Table = Literal["frozen", "trainable"]
AttentionInit = Literal["cosine", "default"]
