"""What things cost in time, as ratios from interleaved runs."""
