"""Loss over shards, optimizers, the trainer and its checkpoints."""
