"""Examples, tokens, rows and batches: everything before a tensor of states."""
