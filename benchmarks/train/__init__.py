"""Training beside the peers: the time of a step, and what comes out of equal tokens."""
