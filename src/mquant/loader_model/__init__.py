"""A model of how loaders read headers and config.json: modules, formats, what is quantized."""
