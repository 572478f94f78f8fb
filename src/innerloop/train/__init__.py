"""Training: recipes, runs, the trainer and its arguments."""
