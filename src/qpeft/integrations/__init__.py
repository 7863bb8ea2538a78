"""Rerankers in the shape that other libraries expect; one module per library, which is imported only there.

Each class takes a ready `Reranker`, or a model's name with options for `Reranker.from_pretrained`.
"""
