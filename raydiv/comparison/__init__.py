"""What comes after the runs of a study: cells in, tables and the test of the papers' claim out. Pure functions of numbers."""
