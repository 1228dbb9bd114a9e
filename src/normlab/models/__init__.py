"""Models: an LSTM, a Transformer and a feed-forward net with norms at named sites; none of them names a norm.

Beside them architectures of the transformers library (`huggingface`), and `swap_norms`, which puts a norm in place of
the LayerNorm and RMSNorm modules of any model.
"""
