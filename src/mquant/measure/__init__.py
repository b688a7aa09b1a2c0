"""What quantization did, in numbers: weights compared, models run, side by side, from disk."""
