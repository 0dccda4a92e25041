"""Text to measured, tokenised shards."""
