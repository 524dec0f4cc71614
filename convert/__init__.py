"""From a Hugging Face folder or hub id to a checkpoint: Orbax parameters with config and tokenizer files."""
