"""The exact fast forward pass: packed attention, loss at trained tokens, generation."""
