"""What a run's directory holds, what is wrong with it, and what to run next."""
