"""The LSTM recurrence; `reference` is the plain loop that faster backends are checked against."""
