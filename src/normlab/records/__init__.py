"""What a run leaves on disk (the record) and its mirror in Weights & Biases; torch-free."""
