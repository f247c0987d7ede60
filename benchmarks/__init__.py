"""Measurements, with the commands that reproduce them and their committed results."""
