"""What each command does: a module (or package) per command, with the command's name.

A module here turns a checked recipe or typed arguments into a result. ``raydiv.cli`` parses and prints;
``raydiv.experiments`` runs many of these. ``preflight`` is what commands check before they compute.
"""
