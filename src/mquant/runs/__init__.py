"""A run that writes OUT, and the verbs that are runs."""
