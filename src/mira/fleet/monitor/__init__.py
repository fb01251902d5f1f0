"""The view of a server's operator: metrics, health, a live page, and a status for people."""
