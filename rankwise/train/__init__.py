"""One visible training loop, its settings, evaluation, and the run folder."""
