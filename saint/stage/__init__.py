"""What makes a script a stage: errors, flags, workers, devices, files, manifests."""
