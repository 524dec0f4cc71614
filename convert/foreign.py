"""Sources that are something else than a Hugging Face folder, known by what lies in them, and what to do with each."""

from pathlib import Path

from ..host.messages import joined, shown
from .auxiliary_files import CONFIG

_EXPECTED = f"expected a Hugging Face folder with {CONFIG} and weights"
_LLAMA_SCRIPT = "python -m transformers.models.llama.convert_llama_weights_to_hf --input_dir {folder} --output_dir NEW"
_ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".xz", ".bz2", ".zst", ".7z")
# What a folder holds, and what it then is.
_KINDS = {
    "iceformer.json": "a checkpoint that `iceformer convert` made: give it to `iceformer compile`",
    "manifest.json": "an artifact that `iceformer compile` made: it needs no conversion",
    "model_index.json": "a diffusers pipeline, which is neither a language model nor an encoder",
    "saved_model.pb": "a TensorFlow model: save it with transformers as safetensors",
    "*.ckpt.index": "a TensorFlow checkpoint: save it with transformers as safetensors",
    "tf_model.h5": "a TensorFlow model: save it with transformers as safetensors",
    "flax_model.msgpack": "a Flax model: save it with transformers as safetensors",
    "openvino_model.xml": "an OpenVINO model: convert the model that it was made from",
    "*.onnx": "an ONNX model: convert the model that it was made from",
    "onnx/*.onnx": "an ONNX model: convert the model that it was made from",
    "*.mlpackage": "a Core ML model: convert the model that it was made from",
    "*.mlmodel": "a Core ML model: convert the model that it was made from",
    "*.mlmodelc": "a Core ML model: convert the model that it was made from",
    "*.tflite": "a TensorFlow Lite model: convert the model that it was made from",
}


def not_a_folder(source: Path) -> str:
    """What to say of a source that is a file."""
    if source.suffix in _ARCHIVES:
        return f"{shown(source)} is an archive, {_EXPECTED}: unpack it and give the folder"
    return f"{shown(source)} is a file, {_EXPECTED}: give the folder that it is in, {shown(source.absolute().parent)}"


def without_config(folder: Path) -> str:
    """What to say of a folder without config.json."""
    return f"{shown(folder)} lacks {CONFIG}{_hint(folder)}"


def _hint(folder: Path) -> str:
    if not any(folder.iterdir()):
        return f", it is empty, {_EXPECTED}"
    if snapshots := _snapshots(folder):
        return f", it is a folder of the hub's cache: give the snapshot in it, {joined(snapshots)}"
    if (folder / "params.json").is_file() and (weights := sorted(path.name for path in folder.glob("consolidated*"))):
        script = _LLAMA_SCRIPT.format(folder=shown(folder))
        kind = f", its weights ({joined(weights)} and params.json) are in the format of Meta or Mistral"
        return f"{kind}: make a Hugging Face folder of them, for Llama with `{script}` of transformers 4"
    for pattern, kind in _KINDS.items():
        if any(folder.glob(pattern)):
            return f", it is {kind}"
    if inner := sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}")):
        return f", but {joined(inner)} in it {'has' if len(inner) == 1 else 'have'} one: give that folder"
    return f", {_EXPECTED}"


def _snapshots(folder: Path) -> list[Path]:
    """The snapshots in a model's folder of the hub's cache, `models--organisation--name`; main's alone if known."""
    inside = folder if folder.name == "snapshots" else folder / "snapshots"
    if not inside.is_dir():
        return []
    snapshots = sorted(path for path in inside.iterdir() if path.is_dir())
    main = inside.parent / "refs" / "main"
    commit = main.read_text(errors="replace").strip() if main.is_file() else ""
    return [path for path in snapshots if path.name == commit] or snapshots
