"""Tokens out of a model: batched generation, sampling, and the one endpoint protocol everything else asks."""
