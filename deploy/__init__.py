"""From a checkpoint to machine code and back: `compile` writes an artifact, `load` opens it into a session."""
