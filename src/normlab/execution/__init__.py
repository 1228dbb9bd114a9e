"""Where runs happen: worker processes on this machine."""
