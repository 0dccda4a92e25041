"""The recipe file (strict schema) and its runner: what to do, in which order, resumable."""
