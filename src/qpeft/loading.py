"""The only place that opens models."""

from __future__ import annotations

import dataclasses
import functools
import os
import time
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from qpeft import methods
from qpeft.adapters._folder import base_identity
from qpeft.errors import ModelError, OptionError, nearest
from qpeft.lm import cpu_attention
from qpeft.lm.causal import CausalLM
from qpeft.lm.compiled import Compiled
from qpeft.lm.context_store import ContextStore
from qpeft.lm.encoder_decoder import EncoderDecoderLM
from qpeft.lm.model_checks import check_causal, check_positions, choose_attention, classifies
from qpeft.lm.pretrained import PretrainedLM, within_memory
from qpeft.lm.quantized import keep_gradients, quantized_options
from qpeft.lm.read_out import WEIGHT, Head, linear_head
from qpeft.model_config import EMBEDDED, ModelConfig
from qpeft.provenance import fingerprint
from qpeft.tuning import read_tuning, tuning_key
from qpeft.types import Reranker

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_lm(config: ModelConfig) -> PretrainedLM:
    """Open a language model, decoder-only or encoder-decoder; also one that was saved as a classifier.

    Raises:
        ModelError: the folder is no model, has no weights, is no language model, or the hub cannot be reached.
        MissingDependencyError: quantisation without bitsandbytes.
    """
    path = model_path(config.model)
    options = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    device = choose_device(config.device)
    config = tuned(config, device)
    dtype = choose_dtype(device) if config.dtype == "auto" else DTYPES[config.dtype]
    settings, tokenizer, model, info = _open(path, config, options, dtype, device)
    if config.quantization == "none":
        said = f"model {config.model!r} does not fit in the memory of {device}; see --quantization"
        with within_memory(ModelError(said)):
            model = model.to(device)
    facts: dict[str, Any] = {
        "name": config.model,
        "folder": Path(path) if Path(path).is_dir() else None,
        "max_length": _context_length(settings, config.max_length),
        "batch_tokens": config.batch_tokens or _batch_tokens(device, config),
        "quantization": config.quantization,
    }
    if settings.is_encoder_decoder:
        return EncoderDecoderLM(model, tokenizer, **facts)
    head = _head(model, Path(path), info, config.model)
    choose_attention(model, config.attention_kernel, device)
    check_causal(model, config.model)
    check_positions(model, config.model)
    facts |= {
        "head": head,
        "has_words": not classifies(settings),
        "compiled": Compiled(model) if config.compile == "yes" else None,
        "store": _context_store(config),
    }
    lm = CausalLM(model, tokenizer, **facts)
    if config.passage_cache_folder is not None and lm.store is not None:
        lm.store.folder = Path(config.passage_cache_folder) / _name_of_contexts(lm, config)
    return lm


def _open(path: str, config: ModelConfig, options: dict[str, Any], dtype: torch.dtype, device: torch.device) -> Any:
    """Return configuration, tokenizer and model of a folder or hub name, and what was missing or in excess.

    Raises:
        ModelError: see `load_lm`.
    """
    try:
        settings = AutoConfig.from_pretrained(path, **options)
        if settings.is_encoder_decoder:
            _check_encoder_decoder(config)
        tokenizer = _tokenizer(path, options)
        quantized = quantized_options(config.quantization, dtype, device)
        opened: Any = _class(settings).from_pretrained(
            path, dtype=dtype, output_loading_info=True, **quantized, **options
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(_explain(config, error)) from error
    model, info = opened
    keep_gradients(model)
    _check_vocabulary(tokenizer, model, config.model)
    if info["missing_keys"]:
        raise ModelError(f"model {config.model!r} is no language model: {min(info['missing_keys'])} has no weights")
    return settings, tokenizer, model, info


def _check_encoder_decoder(config: ModelConfig) -> None:
    if config.passage_cache or config.passage_cache_folder:
        raise OptionError("--passage-cache is for decoder-only models")
    if config.compile == "yes":
        raise OptionError("--compile is for decoder-only models")


def _name_of_contexts(lm: CausalLM, config: ModelConfig) -> str:
    """Return a name that is the same for contexts with the same numbers alone."""
    held = {"dtype": lm.dtype, "quantization": lm.quantization, "storage": config.passage_cache_storage}
    computed = {"attention_kernel": lm.attention_kernel, "device": lm.device.type}
    return fingerprint({**base_identity(lm), **held, **computed})[:16]


def _tokenizer(path: str, options: dict[str, Any]) -> Any:
    """Open a tokenizer.

    Raises:
        OSError: there is none, or it cannot be read; transformers makes an empty one where its files are missing.
    """
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(path, **options)
    except (ImportError, KeyError, TypeError, AttributeError, ValueError) as error:
        told = f"its tokenizer cannot be read ({type(error).__name__}: {error})"
        if find_spec("sentencepiece") is None and any(sign in str(error) for sign in (".model", "tiktoken")):
            told += "; a vocabulary of SentencePiece (*.model) needs the package sentencepiece"
        raise OSError(told) from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise OSError("it has no tokenizer, or an empty one: tokenizer.json or its like is missing")
    return tokenizer


def _check_vocabulary(tokenizer: Any, model: Any, name: str) -> None:
    """Refuse a tokenizer whose words are more than the model's; special tokens are in no text, and may be more."""
    known = model.get_input_embeddings().weight.shape[0]
    for token_id, token in sorted(tokenizer.added_tokens_decoder.items()):
        if token_id >= known and not token.special:
            raise ModelError(
                f"model {name!r} has {known:,} token embeddings, but its tokenizer makes {token.content!r} token "
                f"{token_id:,}: its embeddings were not resized"
            )


def _class(settings: Any) -> Any:
    if classifies(settings):
        return AutoModelForSequenceClassification
    return AutoModelForSeq2SeqLM if settings.is_encoder_decoder else AutoModelForCausalLM


def _head(model: Any, folder: Path, info: Any, name: str) -> Head | None:
    """Return the head on the last token that came with a model.

    Raises:
        ModelError: a classifier of another kind.
    """
    if WEIGHT in info["unexpected_keys"] and folder.is_dir():  # beside a language model, where `qpeft merge` put it
        for path in folder.glob("*.safetensors"):
            with safe_open(path, "pt", device=str(model.device)) as file:
                if WEIGHT in file.keys():  # noqa: SIM118 — it is no mapping
                    return Head(linear_head(file.get_tensor(WEIGHT)))
    if not classifies(model.config):
        return None
    module = getattr(model, "score", None)
    if not isinstance(module, nn.Linear) or module.out_features != 1:
        raise ModelError(
            f"model {name!r} is no language model, and no classifier with a head of one output on the last token"
        )
    return Head(module)


def tuned(config: ModelConfig, device: torch.device) -> ModelConfig:
    """Return the options with what `qpeft doctor --tune` found wherever they are left open; may set torch's threads."""
    found = read_tuning(tuning_key_of(config, device))
    if found is None:
        return config
    if found.threads is not None and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(found.threads)
    dtype = found.dtype if config.dtype == "auto" else config.dtype
    # Kernels are for number types: flash attention knows no float32.
    kernel = found.attention_kernel if dtype == found.dtype else "auto"
    return dataclasses.replace(
        config,
        dtype=dtype,
        attention_kernel=kernel if config.attention_kernel == "auto" else config.attention_kernel,
        batch_tokens=config.batch_tokens or found.batch_tokens,
        compile="yes" if config.compile == "auto" and found.compiled else config.compile,
    )


def tuning_key_of(config: ModelConfig, device: torch.device) -> str:
    """Return what measured settings of a model belong to."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    model = f"{config.model}@{config.revision}, quantization {config.quantization}"
    return tuning_key(model, name, torch.__version__, bool(config.passage_cache or config.passage_cache_folder))


def load_reranker(model: str = EMBEDDED, *, method: str | None = None, **options: Any) -> Reranker:
    """Open a model and build a method around it; see `Reranker.from_pretrained`."""
    module = methods.load(methods.chosen(method, options.get("adapter")))
    of_model = {field.name for field in dataclasses.fields(ModelConfig)} - {"model"}
    of_method = {field.name for field in dataclasses.fields(module.Config)}
    for name in options:
        if name not in of_model | of_method:
            raise OptionError(f"unknown option {name!r}{nearest(name, of_model | of_method)}")
    model_config = ModelConfig(model, **{k: v for k, v in options.items() if k in of_model})
    method_config = module.Config(**{k: v for k, v in options.items() if k in of_method})
    reranker: Reranker = module.build(method_config, load_lm(model_config))
    return reranker


def model_path(name: str) -> str:
    """Return the folder of an embedded or local model, or the hub name as it is.

    Raises:
        ModelError: an existing folder without configuration or weights.
    """
    if name == EMBEDDED:
        return str(resources.files("qpeft") / "models" / EMBEDDED)
    folder = Path(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(f"model folder {name!r} has no config.json")
        if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
            raise ModelError(f"model folder {name!r} has no weights (*.safetensors or *.bin)")
        return name
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(f"model folder {name!r} does not exist")
    return name


def choose_device(name: str) -> torch.device:
    """Return the device of that name; `auto` takes cuda, then mps, then cpu.

    Raises:
        OptionError: torch knows no such device, or it is not there.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise OptionError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return device


def choose_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16 where the device computes with it at least as fast as with float32."""
    if device.type == "cuda":
        # torch itself would say that GPUs before Ampere have it too: it emulates it there, slower than float32.
        native = torch.version.hip or torch.cuda.get_device_properties(device).major >= 8
        return torch.bfloat16 if native else torch.float16
    if device.type != "cpu":
        return torch.float32
    return torch.bfloat16 if cpu_matmul_rate(torch.bfloat16) > cpu_matmul_rate(torch.float32) else torch.float32


@functools.cache
def cpu_matmul_rate(dtype: torch.dtype) -> float:
    """Return the best rate of five matrix products of a small model's shape, in FLOP/s."""
    left, right = torch.ones(1024, 384, dtype=dtype), torch.ones(384, 1536, dtype=dtype)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        left @ right
        best = min(best, time.perf_counter() - start)
    return 2 * left.numel() * right.shape[1] / best


def _batch_tokens(device: torch.device, config: ModelConfig) -> int:
    """Return what keeps a GPU busy, and what a CPU's cache memory holds: larger batches are slower there.

    More would keep a GPU no busier, and pad more: rows of one batch differ the more in length, the more there are.
    """
    if device.type != "cpu":
        return 16_384
    whole = 2_048 if cpu_attention.TILES else 1_024
    # Over encoded contexts, few of the tokens are computed.
    return torch.get_num_threads() * (8_192 if config.passage_cache or config.passage_cache_folder else whole)


def _context_store(config: ModelConfig) -> ContextStore | None:
    size = config.passage_cache or 0.0
    if not size and config.passage_cache_folder is None:
        return None
    return ContextStore(int(size * 2**30), storage=config.passage_cache_storage)


def _context_length(settings: Any, asked: int | None) -> int:
    """Return how many tokens a row may have: what the model was made for, or what is asked for if that is less.

    A model with a second set of rotations for long rows (longrope) takes it for all rows of a batch that has one, so
    by default there are none.
    """
    text = settings.get_text_config() if hasattr(settings, "get_text_config") else settings
    names = ["max_position_embeddings", "n_positions", "seq_length"]
    if hasattr(text, "relative_attention_num_buckets"):
        names.remove("n_positions")  # of T5: what it was trained on, and no limit
    found = [value for name in names if isinstance(value := getattr(text, name, None), int) and value > 0][:1]
    rotations = getattr(text, "rope_parameters", None) or {}
    if asked is not None:
        found.append(asked)
    elif rotations.get("rope_type") == "longrope":
        found.append(rotations["original_max_position_embeddings"])
    return min(found, default=512)


def _explain(config: ModelConfig, error: Exception) -> str:
    if config.model == EMBEDDED or Path(config.model).is_dir():
        return f"model {config.model!r} cannot be opened: {str(error).splitlines()[0]}"
    return (
        f"model {config.model!r} is not a local folder and could not be had from the model hub "
        f"({type(error).__name__}: {str(error).splitlines()[0]}). Without a network, download it elsewhere and give "
        "its folder: --model path/to/folder"
    )
