"""Judges of harm: string rules, and models of the field, each with its published prompt and parsing."""
