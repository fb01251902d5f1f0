"""The first look at a GPU: equality, tests, speed, utilisation and memory in a few minutes, on a machine without network."""
