"""Training: from judged queries to an adapter."""
