"""The engines quantize and dequantize weights. Only this room imports torch and llmcompressor.

(The probe in `verify/loaders` imports torch too, but vLLM's own Python runs the probe.)
"""
