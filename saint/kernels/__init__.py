"""The fast pieces: the same mathematics in torch, C++ and Triton."""
