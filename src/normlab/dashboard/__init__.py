"""Workspaces and a report in W&B, made from the arguments: what runs look like; verdicts come from disk."""
