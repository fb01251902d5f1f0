"""A run from its configuration to its folder: building it, training, measuring, going on."""
