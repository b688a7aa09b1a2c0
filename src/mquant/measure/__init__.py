"""What quantization changed, in numbers: weights compared, models evaluated."""
