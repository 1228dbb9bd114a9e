"""Models: an LSTM and a Transformer with norms at named sites; none of them names a norm."""
