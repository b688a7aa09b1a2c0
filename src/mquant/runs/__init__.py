"""Runs that write a checkpoint into OUT, and the verbs that are such runs."""
