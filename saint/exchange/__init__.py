"""SAEs of other tools in, ours out; labels and evidence for others to read."""
