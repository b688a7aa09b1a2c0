"""Publish a checkpoint: the report, the model card, and the push to the hub."""
