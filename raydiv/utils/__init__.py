"""Helpers without a domain of their own: errors, storage, cache, signals, JSONL files, collectives, secrets, versions.

Nothing here imports another package of raydiv.
"""
