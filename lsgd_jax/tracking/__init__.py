"""What a run writes and shows: its folder, progress, TensorBoard."""
