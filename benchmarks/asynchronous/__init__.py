"""How workers at their own speed fare."""
