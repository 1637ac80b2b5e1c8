"""Hugging Face models: resolving, loading, chat templates, log-probs, export.

Logits are never held for a whole batch: the log-prob head works on the hidden states of response tokens.
"""
