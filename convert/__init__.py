"""From a Hugging Face folder to a checkpoint: safetensors in, Orbax parameters with config and tokenizer files out."""
