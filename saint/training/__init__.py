"""Objectives, step, loop and curves of an SAE's training."""
