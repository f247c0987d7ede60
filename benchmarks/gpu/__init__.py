"""The GPU check: what the package does and costs on one NVIDIA GPU, in less than ten minutes and without a network."""
