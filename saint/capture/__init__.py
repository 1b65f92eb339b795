"""A language model's activations, packed and sharded."""
