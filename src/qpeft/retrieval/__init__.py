"""First stages: from a collection to the candidates that a reranker orders."""
