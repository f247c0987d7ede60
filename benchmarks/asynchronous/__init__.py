"""Workers at their own speeds, on this machine and in virtual time."""
