"""From published files to the examples of a step: readers, tokens, splits, the order of data, reference log-probs.

Prepared data are keyed by their content. The order of training is a function of seed, epoch and data alone.
"""
