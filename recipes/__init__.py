"""Recipes: named configs, full models, text and tasks, training, generation, the command line."""
