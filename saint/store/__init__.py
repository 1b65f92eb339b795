"""Rows on disk: sentences, activations, shuffled rows."""
