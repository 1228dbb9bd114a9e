"""Training: Lightning glue around models, tasks, probes and records."""
