"""Training, evaluation and generation: the batched engine, the reference engine, and the engine of seeds."""
