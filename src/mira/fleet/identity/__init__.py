"""Keys, certificates and signatures of a federation."""
