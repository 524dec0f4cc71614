"""GGUF, the format of llama.cpp: one file with weights, config and tokenizer, read as a Hugging Face folder would be.

`open_gguf` reads what stands before the weights; `unpack` writes config and tokenizer as such a folder has them;
`weights` gives the tensors under the names that they have there.
"""

import json
import re
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...host.messages import listed
from ..json_file import read_json
from .config import read_config
from .header import Header
from .names import pieces_of
from .reader import GgufWeights, find_gguf, make_weights, open_header
from .tokenizer import Vocabulary, build_tokenizer, read_vocabulary

__all__ = ["GgufModel", "find_gguf", "open_gguf"]

# Beside a file, these are the model's own, and a tokenizer that is built of the file's metadata only equals them.
_BESIDE = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json")
_TEMPLATE = "chat_template.jinja"
_SAMPLING = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}
_READ = re.compile(
    r"general\.(?!sampling\.).*|general\.sampling\.(?:temp|top_k|top_p|min_p|penalty_repeat)"
    r"|tokenizer\.(?:chat_templates?(?:\..+)?|huggingface\.json|rwkv\.world)"
    r"|tokenizer\.ggml\.(?:model|pre|tokens|token_type|scores|merges|\w+_token_id|add_bos_token|add_eos_token"
    r"|add_space_prefix|token_type_count)"
    # Of splitting and quantising the file.
    r"|split\..*|quantize\..*|imatrix\..*|mradermacher\..*"
)


@dataclass(frozen=True)
class GgufModel:
    """An opened GGUF file.

    Attributes:
        path: the file; the first of a split model.
        config: as config.json has it.
    """

    path: Path
    config: dict[str, Any]
    header: Header

    def weights(self, dtype: str = "float32") -> GgufWeights:
        """The tensors; quantised ones become `dtype`, "float32", "bfloat16" or "float16", others keep theirs.

        Raises:
            ValueError: an unknown dtype, or tensors of a type that cannot be read.
        """
        pieces = pieces_of(self.header.tensors, self._architecture, self.config)
        return make_weights(self.header, pieces, dtype)

    def unpack(self, folder: Path) -> None:
        """Writes config.json, and tokenizer files and generation_config.json as far as the file has what they say."""
        vocabulary = self._vocabulary()
        _write(folder / "config.json", self.config)
        if vocabulary is not None and self._save_tokenizer(vocabulary, folder / "tokenizer.json"):
            _write(folder / "tokenizer_config.json", self._tokenizer_config(vocabulary))
        _write(folder / "generation_config.json", self._generation_config(vocabulary))

    @property
    def _architecture(self) -> str:
        return self.header.metadata["general.architecture"]

    def _vocabulary(self) -> Vocabulary | None:
        try:
            vocabulary = read_vocabulary(self.header.metadata)
        except ValueError as error:
            self._warn_without(error)
            return None
        rows = self.header.tensors["token_embd.weight"].shape[0]
        if vocabulary is not None and len(vocabulary.tokens) > rows:
            raise ValueError(
                f"{self.path} has {len(vocabulary.tokens)} tokens, expected at most {rows}, the rows of "
                "token_embd.weight"
            )
        return vocabulary

    def _save_tokenizer(self, vocabulary: Vocabulary, target: Path) -> bool:
        try:
            build_tokenizer(vocabulary, architecture=self._architecture).save(str(target))
        except Exception as error:
            # tokenizers raises bare exceptions for vocabularies that do not fit their merges.
            self._warn_without(error)
            return False
        return True

    def _warn_without(self, error: Exception) -> None:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        warnings.warn(
            f"{self.path}: its tokenizer cannot be built ({reason}), so the checkpoint has none: put the model's "
            "tokenizer.json next to the file in a separate folder, and convert that folder",
            stacklevel=2,
        )

    def _tokenizer_config(self, vocabulary: Vocabulary) -> dict[str, Any]:
        ids = {name: vocabulary.id_of(name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **{name: vocabulary.tokens[index] for name, index in ids.items() if index is not None},
            "add_bos_token": vocabulary.adds("bos"),
            "add_eos_token": vocabulary.adds("eos"),
            "clean_up_tokenization_spaces": False,
            "model_max_length": self.header.metadata[f"{self._architecture}.context_length"],
        }
        template = _chat_template(self.header.metadata)
        return config if template is None else config | {"chat_template": template}

    def _generation_config(self, vocabulary: Vocabulary | None) -> dict[str, Any]:
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        config = {name: self.config[name] for name in names if name in self.config}
        if vocabulary is not None and (ends := vocabulary.ends()):
            config["eos_token_id"] = ends
        metadata = self.header.metadata
        sampling = {
            name: metadata[key] for given, name in _SAMPLING.items() if (key := f"general.sampling.{given}") in metadata
        }
        return config | sampling | ({"do_sample": True} if sampling else {})


def open_gguf(path: Path) -> GgufModel:
    """Opens a GGUF file, or a split model by one of its files; warns of metadata that is not read.

    Raises:
        FileNotFoundError: no such file, or one of a split model is missing.
        ModuleNotFoundError: the `gguf` package is not installed.
        ValueError: no GGUF file of a language model that is supported, or damaged.
    """
    header = open_header(path)
    config = read_config(header)
    prefix = f"{header.metadata['general.architecture']}."
    unread = [key for key in sorted(header.metadata) if not key.startswith(prefix) and not _READ.fullmatch(key)]
    if unread:
        warnings.warn(f"{path} has metadata that is not read:{listed(unread)}", stacklevel=2)
    return GgufModel(path, config, header)


def copy_beside(file: Path, folder: Path) -> None:
    """Copies the tokenizer files that lie beside a GGUF file over those that were built of its metadata.

    The chat template of the metadata stays if no file beside it has one.
    """
    config = folder / "tokenizer_config.json"
    template = read_json(config).get("chat_template") if config.is_file() else None
    for name in (*_BESIDE, _TEMPLATE):
        if (file.parent / name).is_file():
            shutil.copyfile(file.parent / name, folder / name)
    if template is not None and not (folder / _TEMPLATE).is_file():
        _write(config, {"chat_template": template, **read_json(config)})


def _chat_template(metadata: Mapping[str, Any]) -> str | list[dict[str, str]] | None:
    """One template, or several by name as transformers has them."""
    prefix = "tokenizer.chat_template."
    texts = {key: value for key, value in metadata.items() if isinstance(value, str)}
    default = texts.get(prefix.rstrip("."))
    others = {key.removeprefix(prefix): value for key, value in texts.items() if key.startswith(prefix)}
    if not others:
        return default
    named = {**({} if default is None else {"default": default}), **others}
    return [{"name": name, "template": template} for name, template in named.items()]


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
