"""Rerank search results with language models, and train such rerankers by touching a tiny part of the model."""
