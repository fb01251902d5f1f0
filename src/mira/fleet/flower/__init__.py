"""Flower: its processes, its apps, and the transport made of them. No other room imports flwr."""
