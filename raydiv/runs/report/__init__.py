"""A run for people: the before | after table, the pictures, and the self-contained report.html."""
