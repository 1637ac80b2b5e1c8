"""A run's directory: where its files are, how far it came, its metrics, heartbeats, tracker and report.

Whatever reads or writes a file of a run goes through this package. A run is described by its directory alone.
"""
