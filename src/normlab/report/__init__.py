"""The report: verdicts of all arguments, computed from the tables in `results/` and shown with what decided them."""
