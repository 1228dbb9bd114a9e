"""What is found out about the machine at hand: its limits; kept: its processor, its fastest matrix products."""
