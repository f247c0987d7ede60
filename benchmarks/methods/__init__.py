"""What the methods are worth: tuned comparisons of many runs, with clean and with corrupted workers."""
