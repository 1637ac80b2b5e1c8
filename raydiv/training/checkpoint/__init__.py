"""Checkpoints: written whole or not at all, checked when they are read, and read under any layout."""
