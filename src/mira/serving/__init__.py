"""What a server needs of a finished run: adapters in its format, its command line, the card, the way to the hub."""
