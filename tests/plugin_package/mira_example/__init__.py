"""Plug-ins for MIRA: one module each."""
