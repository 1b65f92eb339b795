"""Edits of the residual stream, and what they do to the text."""
