"""Answering: continuous batching, decoding, shared prefixes, beams, test-time compute."""
