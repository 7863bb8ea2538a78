"""Encoder-decoder models (T5, T0, Flan-T5 …) as UPR uses them.

Source: Sachan et al. 2022, arXiv 2204.07496.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from qpeft.adapter import Adapter
from qpeft.errors import ModelError
from qpeft.lm.flops import encoder_decoder_flops
from qpeft.lm.pretrained import PretrainedLM, RowLogProbs, pad_ids, token_log_probs
from qpeft.lm.read_out import Head, ReadOut
from qpeft.template import Row


class EncoderDecoderLM(PretrainedLM):
    """Reads the context with its encoder, and says how likely its decoder finds the target."""

    has_encoder = True

    @functools.cached_property
    def _start(self) -> int:
        """The token that the decoder begins with."""
        decoder = self.model.config.get_text_config(decoder=True)
        places = (
            (self.model.config, "decoder_start_token_id"),
            (self.model.generation_config, "decoder_start_token_id"),
        )
        for settings, name in (*places, (decoder, "bos_token_id")):
            if isinstance(found := getattr(settings, name, None), int):
                return found
        raise ModelError(f"{self.name}: its configuration does not say which token the decoder begins with")

    def _forward(
        self, rows: Sequence[Row], with_passage: bool, adapters: Sequence[Adapter | None]
    ) -> list[RowLogProbs]:
        if with_passage:
            raise ModelError(f"{self.name}: an encoder-decoder gives no probability of the passage")
        logits = self._logits(rows, [row.target for row in rows], adapters)
        targets, _ = pad_ids([row.target for row in rows])
        scored, _ = pad_ids([[int(s) for s in row.scored] for row in rows])
        scored = scored.bool()
        values = token_log_probs(logits[scored.to(self.device)], targets[scored].to(self.device)).cpu()
        return [RowLogProbs(value) for value in torch.split(values, scored.sum(1).tolist())]

    def _read(self, rows: Sequence[Row], read_out: ReadOut, adapters: Sequence[Adapter | None]) -> list[Tensor]:
        """Return what stands at the decoder's first position, which is where its answer begins."""
        if isinstance(read_out, Head):
            raise ModelError(f"{self.name}: a head on the last token is for decoder-only models")
        return list(read_out(self._logits(rows, [(0,)] * len(rows), adapters)[:, 0]).cpu())

    def _logits(
        self, rows: Sequence[Row], after: Sequence[tuple[int, ...]], adapters: Sequence[Adapter | None]
    ) -> Tensor:
        """Return what predicts each token of the decoder's texts, `[B, T, V]`."""
        if any(adapter is not None for adapter in adapters):
            raise ModelError(f"{self.name}: adapters are for decoder-only models")
        contexts, context_mask = pad_ids([row.context for row in rows])
        targets, target_mask = pad_ids(after)
        start = torch.full((len(rows), 1), self._start)
        logits: Tensor = self.model(
            input_ids=contexts.to(self.device),
            attention_mask=context_mask.to(self.device),
            decoder_input_ids=torch.cat([start, targets[:, :-1]], 1).to(self.device),
            decoder_attention_mask=target_mask.to(self.device),
            use_cache=False,
        ).logits
        lengths = [(len(row.context), len(target)) for row, target in zip(rows, after, strict=True)]
        tokens = sum(map(sum, lengths))
        flops = None if self.shape is None else encoder_decoder_flops(self.shape, lengths)
        self._count(tokens, contexts.numel() + targets.numel() - tokens, flops)
        return logits
