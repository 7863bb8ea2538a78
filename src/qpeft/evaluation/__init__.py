"""How good a ranking is, whether a difference is more than chance, and what it cost."""
