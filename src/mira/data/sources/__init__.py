"""Sources of clients: one short file for each."""
