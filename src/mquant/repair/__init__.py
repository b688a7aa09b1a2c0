"""What is wrong with a checkpoint, given its parent; and mending it."""
