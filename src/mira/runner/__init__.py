"""Runs: start, training, evaluation, resumption."""
