"""People's labels of a sample of answers, and rates that are corrected by them for the judge's errors."""
