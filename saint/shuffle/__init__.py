"""Stored activations become training rows in one global order."""
