"""Exact arithmetic of NVFP4 and FP8 on arrays, without knowledge of checkpoints.

`floats` defines the formats, `nvfp4` is the readable reference, `thresholds` turns the
reference into tables of integers, `kernels` applies the tables at the speed of memory;
`scale_search` looks for better scales than the reference's. `fp8` quantizes to FP8, `dequantize`
decodes NVFP4 and FP8 to BF16.
"""
