"""The report: verdicts of all arguments, computed from the tables in `results/` and shown with all that decided them."""
