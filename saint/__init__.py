"""What two or more stages share: runtime, manifests, sentences, activation store, kernels."""
