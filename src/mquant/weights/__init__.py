"""Stored weights as float32 rows: the judge's decoder, without the quantizers' code."""
