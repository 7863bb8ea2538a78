"""A server that speaks the rerank dialects of Cohere, Jina, vLLM, TEI and infinity; one batch queue, many adapters."""
