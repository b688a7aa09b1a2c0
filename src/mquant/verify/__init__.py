"""The judge of checkpoints, which shares no code with the engines and kernels."""
