"""Run a model layer by layer, with weights read from disk."""
