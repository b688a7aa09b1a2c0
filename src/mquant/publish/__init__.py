"""Publish a checkpoint: write the report and the model card, and push to the hub."""
