"""Ray: sessions, resources of workers and pools, actor pools on Ray Data, and job submission.

Nothing here knows what is computed. ``session`` starts or joins a cluster, ``actor_pool`` maps rows over actors.
"""
