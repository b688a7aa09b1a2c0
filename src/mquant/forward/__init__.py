"""A model run a layer at a time, weights from disk."""
