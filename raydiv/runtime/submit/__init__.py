"""A command as a Ray job: bundle.py what goes with it, jobs.py the cluster's jobs."""
