"""The machine at hand: processor, terminal, a folder for what is found out once and kept, fastest matrix products."""
