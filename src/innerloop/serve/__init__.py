"""Requests over HTTP, by the protocol of OpenAI's clients."""
