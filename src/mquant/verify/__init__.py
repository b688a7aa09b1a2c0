"""The judge. It shares no code with the engines and kernels that make checkpoints."""
