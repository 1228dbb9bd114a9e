"""Text in, batches out: corpora, tokenizers and loaders."""
