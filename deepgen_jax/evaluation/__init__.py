"""How good a model is, by programs."""
