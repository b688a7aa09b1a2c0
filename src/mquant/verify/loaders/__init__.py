"""Loaders themselves as judges, each in an environment and a process of its own."""
