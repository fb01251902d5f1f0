"""What a federation over machines costs: the product's own server, gate, certificates and SuperLink on loopback."""
