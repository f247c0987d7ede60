"""The GPU check: what the package does and costs on one NVIDIA GPU, in 9.5 minutes at most and without a network."""
