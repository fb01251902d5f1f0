"""Attention of packed passes, and the modules that mix tokens otherwise."""
