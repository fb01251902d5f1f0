"""Nouns and rules that need torch alone: rows and graphs, the round loop, mixing, errors."""
