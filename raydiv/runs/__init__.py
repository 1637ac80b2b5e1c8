"""The directory of a run: its paths, stage, metrics, events, heartbeats, MLflow tracker and report.

All code that reads or writes a file of a run goes through this package. The directory alone describes the run.
"""
