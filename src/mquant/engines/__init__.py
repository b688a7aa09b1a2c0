"""The engines quantize and dequantize weights. Only this room imports torch and llmcompressor.

(The probe in `verify/loaders` imports torch too, but vLLM's own Python runs the probe.)
"""

import os

# Before any module of this room imports llmcompressor:
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # oneshot sets it with a warning
os.environ.setdefault("LLM_COMPRESSOR_LOG_DISABLED", "true")  # else its import writes to stdout
