"""Our own engines of the benchmark: artifacts with two-stage, with exact, and with no attention (`floor`)."""

from pathlib import Path

from ..attention import Attention, Exact, Plan, TwoStage, Values
from ..convert.convert import convert_checkpoint
from ..deploy.compile import compile as compile_checkpoint

OURS = ("two_stage", "exact", "floor")
_CHUNK = 2048


def compile_engine(
    engine: str, source: Path, checkpoint: Path, artifact: Path, *, length: int, attention: TwoStage, dtype: str
) -> None:
    """Writes the artifact of one of our engines, for prompts of `length` tokens.

    Args:
        engine: one of `OURS`.
        source: Hugging Face folder.
        checkpoint: its conversion, made if it is not there.
        artifact: the folder to write, which must not exist.
        length: in tokens; the bucket is that, rounded up to whole chunks.
        attention: of the engine `two_stage`.
        dtype: "float32" or "bfloat16".
    """
    if not checkpoint.exists():
        convert_checkpoint(source, checkpoint)
    chunk = min(_CHUNK, length)
    strategy: Attention = {"two_stage": attention, "exact": Exact(), "floor": Values()}[engine]
    compile_checkpoint(
        checkpoint,
        artifact,
        buckets=(-(-length // chunk) * chunk,),
        attention=Plan(strategy, decode=Values() if engine == "floor" else Exact()),
        dtype=dtype,
        chunk=chunk,
    )
