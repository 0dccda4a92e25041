"""Other people's models as scorers: classifiers, guards, moderation services and judges, each described by a file."""
