"""Judging checkpoints. Shares no code with what makes them: engines and numerics stay out."""
