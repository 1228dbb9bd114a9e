"""Studies: the runs that arguments still miss, planned, run and shown."""
