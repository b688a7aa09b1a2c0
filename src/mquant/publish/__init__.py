"""What goes to people: the report, the model card, the repo on the hub."""
