"""Quantities measured beside the training; a probe never changes the loss."""
