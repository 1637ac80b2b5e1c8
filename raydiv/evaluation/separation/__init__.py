"""Separation of harmless from harmful prompts in hidden states."""
