"""What does the arithmetic. Alone to import torch and llmcompressor.

(vLLM's own Python, not mquant's, runs the probe in `verify/loaders`, which imports torch too.)
"""
