"""Evaluation: answers under attack, judges, coherence, drift, capability, and separation of hidden states.

A run is evaluated before and after training by the same code as any other model.
"""
