"""Send prompts to a running server."""
