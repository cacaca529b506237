"""Which rank a task needs: instruments that measure it."""
