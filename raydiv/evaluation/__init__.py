"""Did alignment work: answers under attack, judges, coherence, drift, capability, and separation of hidden states.

A run is measured before and after training by the same code as any other model.
"""
