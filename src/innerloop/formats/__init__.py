"""Weights that others have released, opened as a stock decoder and our method's parts; no code of theirs is run."""
