"""Measures of what a trained model does, none of which looks at its weights."""
