"""The latent browser: one HTML file."""
