"""What a method sends: by formula, and as read from compiled programs."""
