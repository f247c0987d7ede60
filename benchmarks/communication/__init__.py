"""What communication costs, and what saving it costs."""
