"""What a run will train, compute, hold and take, told from the model's config.json before any weight is loaded."""
