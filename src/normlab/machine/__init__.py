"""The machine at hand: limits, processor, terminal, a folder for what is found out once and kept, fastest products."""
