"""The quantization methods of vLLM 0.32, one file each."""
