"""The gate: a reverse proxy before a SuperLink that passes the fleet API alone."""
