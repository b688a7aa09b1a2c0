"""What does the arithmetic. The only part of mquant that imports torch and llmcompressor."""
