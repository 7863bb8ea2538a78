"""Rerank search results with language models, and train such rerankers by touching a tiny part of the model."""

from qpeft.types import Candidates, Hit, Passage, Query, RankedPassage, Ranking, Reranker, Run

__all__ = ["Candidates", "Hit", "Passage", "Query", "RankedPassage", "Ranking", "Reranker", "Run"]
