"""The gate: the one door to a SuperLink, open to the fleet API alone."""
