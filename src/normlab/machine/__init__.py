"""What is found out once about the machine at hand and kept: its processor, a folder, its fastest matrix products."""
