"""The models: Flax NNX modules named as their checkpoints, one file per architecture, attention as an argument."""
