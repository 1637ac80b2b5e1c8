"""Answers to prompts, judged: attack success, over-refusal, degenerate answers."""
