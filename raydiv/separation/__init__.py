"""Separation of safe from harmful prompts in hidden states, with the controls that make it evidence."""
