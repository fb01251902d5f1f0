"""The server of a federation over machines."""
