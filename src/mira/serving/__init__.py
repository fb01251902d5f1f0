"""Parts of a finished run that a server needs: adapters in its format, its command line, the card, the way to the hub."""
