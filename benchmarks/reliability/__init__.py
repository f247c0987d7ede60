"""What it costs that runs can be stopped, and how they come back."""
