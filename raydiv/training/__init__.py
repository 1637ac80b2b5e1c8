"""What runs inside a training worker: the loop, the step (score, judge, push), the engine, checkpoints, the watchdog.

Every rank does the same. The update does not depend on the number of workers or on micro-batches.
"""
