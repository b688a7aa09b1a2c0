"""What vLLM 0.32 does with a checkpoint's headers and config.json, without vLLM.

The modules that an architecture builds, the parameters of each, and the parameter that each tensor
is copied into, with vLLM's own order of steps. `load.py` puts the steps together.
"""
