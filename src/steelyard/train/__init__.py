"""Training: for now the embedded scorers; issue by issue the rest."""
