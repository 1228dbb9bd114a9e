"""The recurrences of LSTM, GRU and RNN; `reference` is the plain loop that faster backends are checked against."""
