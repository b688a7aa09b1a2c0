"""A running server, asked a few prompts."""
