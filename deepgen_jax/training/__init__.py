"""Training: supervised stages 1 and 2, and the parts that reinforcement learning shares."""
