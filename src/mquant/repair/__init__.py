"""The diagnosis of a broken checkpoint, given its parent, and its repair."""
