"""What Claude is asked about the latents, and answers."""
