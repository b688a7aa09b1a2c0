"""Calibration: text goes through the model, layer by layer, in bounded memory.

`walk` is the pass. A method is a `Listener` of the pass: it sees the inputs of each layer's linear
modules, and gives the weights that compute the outputs.
"""
