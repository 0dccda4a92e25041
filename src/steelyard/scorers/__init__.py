"""Text to probabilities: toxicity, refusal. Scorers carry weights, their errors and canaries; never thresholds."""
