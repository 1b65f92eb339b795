"""What is known of each latent."""
