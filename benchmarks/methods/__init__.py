"""What the methods are worth: tuned comparisons of many runs, with sound and with unsound workers."""
