"""What loaders make of headers and config.json: modules, formats, what is quantized."""
