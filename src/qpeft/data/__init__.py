"""Real formats in, `Candidates` and `Group`s out."""
