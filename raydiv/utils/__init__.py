"""Code without a domain: errors, storage, cache, signals, JSONL files, collectives, secrets, versions.

Nothing here imports another package of raydiv.
"""
