"""Construction of an experiment: base model, clients, adapter, method, graph, engine, and the record of their environment."""
