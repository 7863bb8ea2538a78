"""The language models: how rows of tokens become log-probabilities, exactly and quickly.

`pretrained` is what all of them share, `causal` and `encoder_decoder` are the two kinds. A batch: `waiting` rows are
chosen, adapters write `hints`, `layout` makes rectangles of them, `read_out` says what is read at their ends. Contexts
that are encoded once: `encoding`, kept in a `context_store`, gone on from in `past`. Less work with the same result:
`last_layer`, `cpu_attention`, `compiled`, `side_by_side`, `replay`, `depth`, each tried on a model first (`agreement`,
`model_checks`). What it costs: `flops`.
"""
