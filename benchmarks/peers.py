"""Other packages on the same pairs: cross-encoders of the same shape, and whatever scores by query likelihood.

They are installed apart (`make bench-env`) and imported here only. Each is opened as its documentation shows, with the
model that stands in a local folder; one that is absent, or does not run, is named in the result with the reason.

Cross-encoders have random heads: what they say is worthless, what they take is not. Those that read only T5 get a
random T5, and ours reads the same.
"""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, T5Tokenizer

from pairs import texts
from qpeft.loading import load_lm, model_path
from qpeft.model_config import EMBEDDED, ModelConfig
from qpeft.types import Candidates
from shapes import MAX_LENGTH, random_model

Score = Callable[[Sequence[Candidates]], Any]
ROWS = 32
"""Rows in a batch, where a peer's own default is 1."""


class UnsuitableError(Exception):
    """A peer cannot be measured with this shape."""


def cross_encoder_folder(model: str, folder: Path) -> str:
    """Write a cross-encoder of a BERT model's shape, its body's weights and a random head, into `folder`."""
    torch.manual_seed(0)
    encoder = AutoModelForSequenceClassification.from_pretrained(
        model, num_labels=1, is_decoder=False, dtype=torch.float32
    )
    encoder.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return str(folder)


def t5_folder(folder: Path) -> str:
    """Write a random T5, with a tokenizer that has the embedded model's pieces, into `folder`."""
    pieces = AutoTokenizer.from_pretrained(model_path(EMBEDDED)).get_vocab()
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -20.0)]
    words = [piece[2:] if piece.startswith("##") else f"▁{piece}" for piece in pieces if not piece.startswith("[")]
    tokenizer = T5Tokenizer([*special, *[(word, -10.0) for word in dict.fromkeys(words) if word != "▁"]], extra_ids=0)
    tokenizer.save_pretrained(folder)
    random_model("t5-small", dtype=torch.float32).save_pretrained(folder)
    return str(folder)


def sentence_transformers(folder: str, dtype: torch.dtype) -> Score:
    """`CrossEncoder` with its own batch size."""
    from sentence_transformers import CrossEncoder

    model = CrossEncoder(folder, device="cpu", max_length=MAX_LENGTH, model_kwargs={"dtype": dtype})

    def score(items: Sequence[Candidates]) -> Any:
        pairs = [(query.text, f"{passage.title} {passage.text}") for query, passage in texts(items)]
        return model.predict(pairs, show_progress_bar=False)

    return score


def rerankers_cross_encoder(folder: str, dtype: torch.dtype) -> Score:
    """`rerankers`' ranker for cross-encoders."""
    from rerankers.models.transformer_ranker import TransformerRanker

    return _ranked(TransformerRanker(folder, dtype=dtype, device="cpu", verbose=0, batch_size=ROWS))


def rerankers_llm(folder: str, dtype: torch.dtype) -> Score:
    """`rerankers`' ranker for causal models, which reads off the logit of "Yes"."""
    from rerankers.models.llm_layerwise_ranker import LLMLayerWiseRanker

    return _ranked(LLMLayerWiseRanker(folder, dtype=dtype, device="cpu", verbose=0, batch_size=ROWS))


def rerankers_upr(folder: str, dtype: torch.dtype) -> Score:
    """`rerankers`' query likelihood, for T5 only."""
    from rerankers.models.upr import UPRRanker

    return _ranked(UPRRanker(folder, dtype=dtype, device="cpu", verbose=0, batch_size=ROWS))


def _ranked(ranker: Any) -> Score:
    def score(items: Sequence[Candidates]) -> Any:
        return [ranker.rank(item.query.text, [f"{p.title} {p.text}" for p in item.passages]) for item in items]

    return score


def llm_rankers_qlm(folder: str, dtype: torch.dtype) -> Score:
    """`llm-rankers`' query likelihood, for T5 only and on CPUs in float32."""
    from llmrankers.pointwise import PointwiseLlmRanker
    from llmrankers.rankers import SearchResult

    if dtype is not torch.float32:
        raise UnsuitableError("computes in float32 on CPUs")
    ranker = PointwiseLlmRanker(folder, None, "cpu", method="qlm", batch_size=ROWS)

    def score(items: Sequence[Candidates]) -> Any:
        with contextlib.redirect_stderr(io.StringIO()):
            for item in items:
                found = [SearchResult(p.id, 0.0, f"{p.title} {p.text}") for p in item.passages]
                ranker.rerank(item.query.text, copy.deepcopy(found))

    return score


def minicons_conditional(folder: str, dtype: torch.dtype) -> Score:
    """`minicons`' conditional log-probabilities, a batch at a time."""
    from minicons import scorer

    from naive import PROMPT

    lm = scorer.IncrementalLMScorer(folder, "cpu", dtype=dtype)

    def score(items: Sequence[Candidates]) -> list[float]:
        scores: list[float] = []
        for item in items:
            prompts = [PROMPT.format(title=p.title, text=p.text) for p in item.passages]
            for start in range(0, len(prompts), ROWS):
                some = prompts[start : start + ROWS]
                scores += lm.conditional_score(some, [item.query.text] * len(some))
        return scores

    return score


def ours_on_t5(folder: str, dtype: torch.dtype) -> Score:
    """Our scorer on the T5 that `rerankers` and `llm-rankers` read."""
    from qpeft.methods.query_likelihood import Config, build

    lm = load_lm(ModelConfig(folder, device="cpu", dtype=str(dtype).removeprefix("torch."), max_length=MAX_LENGTH))

    def score(items: Sequence[Candidates]) -> Any:
        return list(build(Config(template="upr"), lm).rerank(items))

    return score


OURS_T5 = "qpeft, bf16 (T5)"
FLOAT, HALF = torch.float32, torch.bfloat16
CROSS_ENCODERS: dict[str, tuple[Callable[[str, torch.dtype], Score], torch.dtype]] = {
    "sentence-transformers CrossEncoder, fp32": (sentence_transformers, FLOAT),
    "sentence-transformers CrossEncoder, bf16": (sentence_transformers, HALF),
    "rerankers TransformerRanker, fp32": (rerankers_cross_encoder, FLOAT),
    "rerankers TransformerRanker, bf16": (rerankers_cross_encoder, HALF),
}
CAUSAL: dict[str, tuple[Callable[[str, torch.dtype], Score], torch.dtype]] = {
    "rerankers LLMLayerWiseRanker, fp32": (rerankers_llm, FLOAT),
    "minicons conditional_score, fp32": (minicons_conditional, FLOAT),
}
T5: dict[str, tuple[Callable[[str, torch.dtype], Score], torch.dtype]] = {
    "rerankers UPRRanker, fp32 (T5)": (rerankers_upr, FLOAT),
    "rerankers UPRRanker, bf16 (T5)": (rerankers_upr, HALF),
    "llm-rankers qlm, fp32 (T5)": (llm_rankers_qlm, FLOAT),
    "qpeft, fp32 (T5)": (ours_on_t5, FLOAT),
    OURS_T5: (ours_on_t5, HALF),
}


def open_peers(shape: str, folder: str, workplace: Path) -> tuple[dict[str, Score], dict[str, str]]:
    """Return the peers that can be measured with a shape, and of each other one why it cannot.

    Args:
        shape: the model's name in `shapes`.
        folder: where it lies.
        workplace: where models for the peers may be written.
    """
    groups: list[tuple[dict[str, Any], Callable[[], str]]] = [(CAUSAL, lambda: folder)]
    absent = {}
    if shape == EMBEDDED:
        groups.insert(0, (CROSS_ENCODERS, lambda: cross_encoder_folder(folder, workplace / "cross-encoder")))
        groups.append((T5, lambda: t5_folder(workplace / "t5")))
    else:
        absent = dict.fromkeys([*CROSS_ENCODERS, *T5], "measured with the embedded model's shape")
    opened: dict[str, Score] = {}
    for group, make in groups:
        model = make()
        for name, (open_peer, dtype) in group.items():
            try:
                opened[name] = open_peer(model, dtype)
            except Exception as error:  # a peer's failure is a finding, whatever it is
                absent[name] = reason(error)
    return opened, absent


def reason(error: Exception) -> str:
    """Return a peer's failure in one line."""
    if isinstance(error, ImportError):
        return f"not installed: {error}"
    lines = str(error).splitlines()
    return f"does not run: {type(error).__name__}: {lines[0] if lines else ''}".strip()
