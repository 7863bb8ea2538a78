"""The wire formats: what each client sends, and what it expects back. No logic of ranking.

    POST /v1/rerank        Cohere v1, Jina, vLLM      documents may be texts or {"text", "title"}
    POST /v2/rerank        Cohere v2, vLLM
    POST /rerank           TEI by its `texts`; by its `documents` vLLM, or infinity where `raw_scores` stands there too
    POST /score            vLLM
    POST /v1/rerank/batch  qpeft's own: many queries

Fields that are not listed in `requests` are ignored, as the peers do.
"""
