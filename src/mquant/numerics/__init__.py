"""Exact NVFP4 arithmetic on arrays. It knows no checkpoints.

`formats` defines the number formats, `nvfp4` is the readable reference, `thresholds` turns the
reference into tables of integers, `kernels` applies the tables at the speed of memory;
`scale_search` looks for better scales than the reference's.
"""
