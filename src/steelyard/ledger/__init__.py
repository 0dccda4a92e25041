"""What happened: content-addressed artifacts, runs, and an append-only hash-chained event log."""
