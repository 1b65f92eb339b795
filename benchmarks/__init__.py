"""What is measured, each by `python -m benchmarks.<name>` from the repository's root."""
