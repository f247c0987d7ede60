"""The paper's objectives, bounds and figures, and a verdict on each of its claims."""
