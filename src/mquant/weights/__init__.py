"""Decode stored weights to float32 rows for `verify`, without the quantizers' code."""
