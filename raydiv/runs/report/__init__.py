"""The report of a run: the before | after table, the pictures, and the self-contained report.html."""
