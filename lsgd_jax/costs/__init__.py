"""Communication cost of a method: by formula, and from compiled programs."""
