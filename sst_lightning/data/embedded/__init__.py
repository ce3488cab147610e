"""Small data sets written for this project: deterministic, offline, nothing taken from others."""
