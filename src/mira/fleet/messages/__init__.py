"""Messages between the server and its sites: their form, and their validation."""
