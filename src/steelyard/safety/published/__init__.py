"""Sets of prompts that others publish: each is read from its own files, and measured as its authors define it."""
