"""The independent reference of the models: transformers in torch, with random weights."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel


def shared_fields(config: Any) -> set[str]:
    """Fields of our configuration that transformers' has too, by the same name."""
    ours = {"ropes", "windows", "task", "num_labels", "pad_token_id", "causal", "ignored"}
    return {each.name for each in dataclasses.fields(config)} - ours


def save_random(
    folder: Path,
    model_type: str,
    *,
    seed: int = 0,
    dtype: str = "float32",
    max_shard_size: str = "1GB",
    save_original_format: bool = True,
    auto_class: Any = AutoModelForCausalLM,
    **config: Any,
) -> PreTrainedModel:
    """Saves a random model in `dtype`, under the hub's names or transformers' own; returns it in float32.

    Every parameter is random, biases and norms too, and large enough that a mistake shows in the logits.
    """
    torch.manual_seed(seed)
    # The default ends of texts are ids of full vocabularies, which tiny ones do not have.
    fields = {"eos_token_id": None, **config}
    model = auto_class.from_config(AutoConfig.for_model(model_type, **fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    model.to(getattr(torch, dtype)).save_pretrained(
        folder, max_shard_size=max_shard_size, save_original_format=save_original_format
    )
    # Loaded again, because a cast of the model would round its rotary frequencies too. Eager, because torch's grouped
    # product takes only multiples of 16 bytes.
    return auto_class.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
