"""Folders that sentence-transformers saved: where their parts lie, and what their files ask for.

Every field of their files is applied, known to change nothing, or refused by name. Source: sentence-transformers 6.2.
"""

import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

from ..host.messages import joined, listed, shown
from ..model.pooling import MODES, TORCH_ACTIVATIONS, Dense, EmbeddingConfig, Normalize
from .json_file import parse_json, read_json

MODULES = "modules.json"
MODEL_CONFIG = "config_sentence_transformers.json"
TRANSFORMER_CONFIGS = tuple(
    f"sentence_{name}_config.json" for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta")
)
"""The config of a Transformer module, under the first of these names that there is."""
_CONFIG = "config.json"
_WITHOUT = f"; remove {MODULES} to convert the model without a sentence embedding"
_MODEL_FIELDS = {
    *("model_type", "prompts", "default_prompt_name", "similarity_fn_name", "truncate_dim", "activation_fn"),
    # These change nothing: versions, and which layers compute in float32, as heads do here.
    *("__version__", "requirements", "keep_in_fp32_modules"),
}
_TRANSFORMER_FIELDS = {
    *("max_seq_length", "do_lower_case", "transformer_task", "modality_config", "module_output_name", "unpad_inputs"),
    *("model_args", "model_kwargs", "config_args", "config_kwargs", "tokenizer_args", "processor_kwargs"),
    *("processing_kwargs", "query_length", "document_length", "query_expansion", "tokenizer_name_or_path"),
}
_NULL_ONLY = ("processing_kwargs", "query_length", "document_length", "query_expansion", "tokenizer_name_or_path")
# Arguments of loading that say how the model runs, not what it computes.
_LOADING = {
    *("torch_dtype", "dtype", "attn_implementation", "device_map", "low_cpu_mem_usage", "use_safetensors"),
    *("trust_remote_code", "use_cache", "use_memory_efficient_attention", "unpad_inputs", "add_pooling_layer"),
}
_TOKENIZING = {"model_max_length", "truncation_side", "padding_side", "use_fast", "trust_remote_code"}
_SWITCHES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""The older form of a Pooling config: a switch for each mode, concatenated in this order."""
_POOLING_FIELDS = {"word_embedding_dimension", "embedding_dimension", "pooling_mode", "include_prompt", *_SWITCHES}
_DENSE_FIELDS = {
    *("in_features", "out_features", "bias", "activation_function", "use_residual"),
    *("module_input_name", "module_output_name"),
}
_TASKS = {
    "SentenceTransformer": ("feature-extraction", "last_hidden_state", "token_embeddings"),
    "CrossEncoder": ("sequence-classification", "logits", "scores"),
}
"""By a folder's `model_type`: what its Transformer is for, the result it takes, and how that is called."""


@dataclass(frozen=True)
class SentenceFolder:
    """A folder with modules.json.

    Attributes:
        root: the folder of the model itself, its weights and its tokenizer.
        kind: what the folder is for, a name of `_TASKS`.
        config: of the whole, from config_sentence_transformers.json.
        options: of the Transformer, from sentence_bert_config.json.
        embedding: what makes the sentence embedding; None for a cross-encoder.
        dense: the folders of the embedding's dense layers, in order.
    """

    root: Path
    kind: str
    config: Mapping[str, Any]
    options: Mapping[str, Any]
    embedding: EmbeddingConfig | None
    dense: tuple[Path, ...]

    @property
    def lowercases(self) -> bool:
        """Whether texts lose their capitals before the tokenizer sees them."""
        return self.options.get("do_lower_case") is True


def open_sentence_folder(source: Path) -> SentenceFolder | None:
    """What sentence-transformers saved in a folder; None if it has no modules.json.

    Raises:
        FileNotFoundError: it lacks a config that modules.json asks for.
        ValueError: a path out of the folder, a module or a field that is not supported; by name.

    Warns:
        UserWarning: files of sentence-transformers that have no effect.
    """
    config = read_optional(source / MODEL_CONFIG)
    kind = config.get("model_type", "SentenceTransformer")
    if not isinstance(kind, str) or kind not in _TASKS:
        raise ValueError(f"{MODEL_CONFIG}: model_type is {shown(repr(kind))}, supported: {', '.join(_TASKS)}")
    if not (source / MODULES).exists():
        _warn_of_lone_files(source)
        return None
    if unread := sorted(config.keys() - _MODEL_FIELDS):
        warnings.warn(
            f"{MODEL_CONFIG} has {joined(unread)}, which sentence-transformers does not read and which changes "
            "nothing here",
            stacklevel=3,
        )
    modules = [(_class_of(module), source / module_path(module)) for module in read_modules(source / MODULES)]
    kinds = [name for name, _ in modules]
    expected = ["Transformer"] if kind == "CrossEncoder" else ["Transformer", "Pooling"]
    steps = modules[len(expected) :]
    further = () if kind == "CrossEncoder" else ("Dense", "Normalize", "Dropout")
    if kinds[: len(expected)] != expected or not {name for name, _ in steps} <= set(further):
        behind = f", then any of {', '.join(further)}" if further else ""
        raise ValueError(
            f"{MODULES} has the modules {joined(kinds) or 'of an empty list'}, supported: {', '.join(expected)}"
            f"{behind} ({kind}){_WITHOUT}"
        )
    root = modules[0][1]
    options = next((read_json(root / name) for name in TRANSFORMER_CONFIGS if (root / name).exists()), {})
    _check_options(options, kind)
    embedding, dense = (None, ()) if kind == "CrossEncoder" else _read_embedding(modules[1][1], steps)
    return SentenceFolder(root, kind, config, options, embedding, dense)


def read_modules(file: Path) -> list[Mapping[str, Any]]:
    """What modules.json lists; ValueError if it is not a list of modules with a type and a path."""
    modules = parse_json(file)
    if not isinstance(modules, list) or not all(
        isinstance(module, Mapping) and all(isinstance(module.get(name), str) for name in ("type", "path"))
        for module in modules
    ):
        raise ValueError(f"{MODULES} holds {str(modules)[:40]}, expected a list of modules with type and path")
    return modules


def module_path(module: Mapping[str, Any]) -> str:
    """The folder of a module inside its model's; ValueError if it leads out of that."""
    path = module["path"]
    parts = PureWindowsPath(path)
    if parts.anchor or ".." in parts.parts or "\0" in path:
        raise ValueError(f"{MODULES} has the path {shown(repr(path))}, expected a folder inside the model's")
    return path


def read_optional(file: Path) -> dict[str, Any]:
    return read_json(file) if file.exists() else {}


def _warn_of_lone_files(source: Path) -> None:
    found = [name for name in (MODEL_CONFIG, *TRANSFORMER_CONFIGS) if (source / name).exists()]
    if found:
        warnings.warn(
            f"{shown(source)} has {', '.join(found)} but no {MODULES}: it is converted as a plain model, without "
            "sentence embedding, prompts or maximum length. sentence-transformers would take the mean over its tokens; "
            f"download {MODULES} and the folders that it names, if there are any",
            stacklevel=4,
        )


def _class_of(module: Mapping[str, Any]) -> str:
    package, _, name = module["type"].rpartition(".")
    if package and package.partition(".")[0] != "sentence_transformers":
        raise ValueError(
            f"{MODULES} names the module {shown(module['type'])}, which is custom code of the model and is never run"
            f"{_WITHOUT}"
        )
    return name


def _check_options(options: Mapping[str, Any], kind: str) -> None:
    """Refuses what a Transformer's config asks for that is not done."""
    problems = [f"{name} is not known" for name in sorted(options.keys() - _TRANSFORMER_FIELDS)]
    problems += [f"{name} is {options[name]!r}, supported: null" for name in _NULL_ONLY if options.get(name)]
    for names, harmless in (
        (("model_args", "model_kwargs", "config_args", "config_kwargs"), _LOADING),
        (("tokenizer_args", "processor_kwargs"), _TOKENIZING),
    ):
        for name in names:
            given = options.get(name) or {}
            if not isinstance(given, Mapping) or given.keys() - harmless:
                problems.append(f"{name} is {given!r}, supported: {', '.join(sorted(harmless))}")
    task, result, output = _TASKS[kind]
    for name, expected in (("transformer_task", task), ("module_output_name", output)):
        if options.get(name, expected) != expected:
            problems.append(f"{name} is {options[name]!r}, supported: {expected!r}")
    modalities = options.get("modality_config", {"text": {"method": "forward", "method_output_name": result}})
    if modalities != {"text": {"method": "forward", "method_output_name": result}}:
        problems.append(f"modality_config is {modalities!r}, supported: only text, with forward and {result}")
    if not isinstance(options.get("do_lower_case", False), bool):
        problems.append(f"do_lower_case is {options['do_lower_case']!r}, expected true or false")
    if problems:
        raise ValueError(f"{TRANSFORMER_CONFIGS[0]}:{listed(problems)}")


def _read_embedding(pooling: Path, modules: Collection[tuple[str, Path]]) -> tuple[EmbeddingConfig, tuple[Path, ...]]:
    modes, include_prompt = _read_pooling(read_json(pooling / _CONFIG), f"{pooling.name}/{_CONFIG}")
    steps: list[Dense | Normalize] = []
    for kind, folder in modules:
        where = f"{folder.name}/{_CONFIG}"
        if kind == "Dense":
            steps.append(_read_dense(read_json(folder / _CONFIG), where))
        elif kind == "Normalize":
            _check_names(read_optional(folder / _CONFIG), where)
            steps.append(Normalize())
    dense = tuple(folder for kind, folder in modules if kind == "Dense")
    return EmbeddingConfig(modes, include_prompt, tuple(steps)), dense


def _read_pooling(config: Mapping[str, Any], where: str) -> tuple[tuple[str, ...], bool]:
    """Its modes, and whether it pools prompts too."""
    _refuse_unknown(
        config, {"word_embedding_dimension", "embedding_dimension", "pooling_mode", "include_prompt", *_SWITCHES}, where
    )
    include_prompt = config.get("include_prompt", True)
    switches = {name: config[name] for name in _SWITCHES if name in config}
    wrong = {"include_prompt": include_prompt, **switches}
    if wrong := [f"{name} is {value!r}" for name, value in wrong.items() if not isinstance(value, bool)]:
        raise ValueError(f"{where}: {joined(wrong)}, expected true or false{_WITHOUT}")
    modes = config.get("pooling_mode", [_SWITCHES[name] for name, chosen in switches.items() if chosen] or "mean")
    modes = [modes] if isinstance(modes, str) else modes
    if not isinstance(modes, list) or not modes or any(mode not in MODES for mode in modes):
        raise ValueError(f"{where}: the pooling is {shown(modes)}, supported: {', '.join(MODES)}{_WITHOUT}")
    return tuple(modes), include_prompt


def _read_dense(config: Mapping[str, Any], where: str) -> Dense:
    names = {"module_input_name", "module_output_name"}
    _refuse_unknown(
        config, {"in_features", "out_features", "bias", "activation_function", "use_residual", *names}, where
    )
    _check_names(config, where)
    if config.get("use_residual", False) is not False:
        raise ValueError(f"{where}: use_residual is {shown(repr(config['use_residual']))}, supported: false{_WITHOUT}")
    sizes = [config.get(name) for name in ("in_features", "out_features")]
    use_bias = config.get("bias", True)
    if any(type(size) is not int or size < 1 for size in sizes) or not isinstance(use_bias, bool):
        raise ValueError(
            f"{where}: in_features, out_features and bias are {shown([*sizes, use_bias])}, expected "
            "two whole numbers above 0, and true or false"
        )
    activation = read_activation(config.get("activation_function", "torch.nn.Tanh"), where)
    return Dense(config["in_features"], config["out_features"], use_bias, activation)


def _check_names(config: Mapping[str, Any], where: str) -> None:
    """ValueError unless a module reads and writes the sentence embedding."""
    for name in ("module_input_name", "module_output_name"):
        if config.get(name) not in (None, "sentence_embedding"):
            raise ValueError(
                f"{where}: {name} is {shown(repr(config[name]))}, supported: 'sentence_embedding'{_WITHOUT}"
            )


def _refuse_unknown(config: Mapping[str, Any], known: Collection[str], where: str) -> None:
    if unknown := sorted(config.keys() - set(known)):
        raise ValueError(f"{where}: {joined(unknown)} is not known, expected: {', '.join(sorted(known))}{_WITHOUT}")


def read_activation(name: object, where: str) -> str:
    """The class of an activation, from its dotted name in torch.nn."""
    package, _, found = str(name).rpartition(".")
    if found not in TORCH_ACTIVATIONS or (package != "torch.nn" and not package.startswith("torch.nn.modules.")):
        raise ValueError(
            f"{where}: the activation is {shown(repr(name))}, supported, of torch.nn: "
            f"{', '.join(sorted(TORCH_ACTIVATIONS))}"
        )
    return found
