"""Measuring models: separation of prompts in their hidden states, and what they answer."""
