"""Training and measuring: the loop, optimiser, schedule, objective, checkpoint."""
