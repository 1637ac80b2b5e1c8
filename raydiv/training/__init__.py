"""A training worker: the loop, the step (score, judge, push), the engine, checkpoints and the watchdog.

All ranks run the same code in the same order. The update does not depend on the number of workers or on micro-batches.
"""
