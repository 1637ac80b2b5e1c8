"""Many runs that answer one question: a sweep over recipe values, a study over models, data and losses.

Every trial and every cell is an ordinary run. What they share (data, reference log-probs, the baseline) is made once.
"""
