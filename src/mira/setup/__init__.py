"""An experiment built: base model, clients, adapter, method, graph and engine, and the environment they ran in."""
