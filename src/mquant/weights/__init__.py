"""Stored weights as float32 rows. The judge decodes with this: no code of the quantizers."""
