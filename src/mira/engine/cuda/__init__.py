"""Capture and replay of training passes as CUDA graphs."""
