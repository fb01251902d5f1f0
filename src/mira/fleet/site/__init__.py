"""A site of a federation over machines."""
