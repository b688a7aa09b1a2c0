"""Real loaders as judges, each in its own environment and process."""
