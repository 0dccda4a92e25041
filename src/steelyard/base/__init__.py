"""What every room stands on: errors, canonical bytes, safe files, progress. Imports nothing of Steelyard."""
