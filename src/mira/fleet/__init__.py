"""The same run over machines: who may take part, what travels, and what is made of it."""
