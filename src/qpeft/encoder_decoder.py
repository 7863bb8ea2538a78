"""Encoder-decoder models (T5, T0, Flan-T5, BART …) as UPR uses them.

Source: Sachan et al. 2022, arXiv 2204.07496.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qpeft.errors import ModelError
from qpeft.flops import encoder_decoder_flops
from qpeft.hints import HintWriter
from qpeft.pretrained import PretrainedLM, RowLogProbs, pad_ids, token_log_probs
from qpeft.template import Row


class EncoderDecoderLM(PretrainedLM):
    """Reads the context with its encoder, and says how likely its decoder finds the target."""

    has_encoder = True

    def _forward(
        self, rows: Sequence[Row], with_passage: bool, adapters: Sequence[HintWriter | None]
    ) -> list[RowLogProbs]:
        if any(adapter is not None for adapter in adapters):
            raise ModelError(f"{self.name}: adapters are for decoder-only models")
        if with_passage:
            raise ModelError(f"{self.name}: an encoder-decoder gives no probability of the passage")
        contexts, context_mask = pad_ids([row.context for row in rows])
        targets, target_mask = pad_ids([row.target for row in rows])
        start = torch.full((len(rows), 1), self.model.config.decoder_start_token_id)
        logits = self.model(
            input_ids=contexts.to(self.device),
            attention_mask=context_mask.to(self.device),
            decoder_input_ids=torch.cat([start, targets[:, :-1]], 1).to(self.device),
            decoder_attention_mask=target_mask.to(self.device),
            use_cache=False,
        ).logits
        lengths = [(len(row.context), len(row.target)) for row in rows]
        tokens = sum(map(sum, lengths))
        flops = None if self.shape is None else encoder_decoder_flops(self.shape, lengths)
        self._count(tokens, contexts.numel() + targets.numel() - tokens, flops)
        scored, _ = pad_ids([[int(s) for s in row.scored] for row in rows])
        scored = scored.bool()
        values = token_log_probs(logits[scored.to(self.device)], targets[scored].to(self.device)).cpu()
        return [RowLogProbs(value) for value in torch.split(values, scored.sum(1).tolist())]
