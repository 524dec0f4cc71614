"""What clients send, as pydantic models: OpenAI's fields, and those of vLLM and llama-server that have a use here.

A field that is not known, or that would change the answer and is not supported, is refused and never ignored.
"""

from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from .errors import ApiError

Ids = list[int]

_MOST_STOPS = 16
_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"
_IGNORED = frozenset(
    {
        "cache_prompt",
        "metadata",
        "parallel_tool_calls",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)
"""Fields that say how to compute, to bill or to store, and leave the answer as it is."""
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": ("medium",),
    "web_search_options": (),
}
"""Fields that are not supported, and the values besides null with which they change nothing."""


class Body(BaseModel):
    """The body of a request."""

    model_config = ConfigDict(strict=True, extra="allow")

    model: str | None = None


class StreamOptions(BaseModel):
    """OpenAI's `stream_options`."""

    model_config = ConfigDict(strict=True, extra="forbid")

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Writing(Body):
    """What `chat/completions` and `completions` have in common."""

    max_tokens: int | None = None
    n: int | None = None
    seed: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_progress: bool | None = None

    @field_validator("stop")
    @classmethod
    def _few_stops(cls, value: str | list[str] | None) -> str | list[str] | None:
        if isinstance(value, list) and len(value) > _MOST_STOPS:
            raise ValueError(f"{len(value)} stop strings, expected at most {_MOST_STOPS}")
        return value

    @property
    def stops(self) -> list[str] | None:
        """The stop strings as a list; None where the model's own hold."""
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)


Messages = list[dict[str, Any]]


class ChatBody(Writing):
    """The body of `/v1/chat/completions`."""

    messages: Messages
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class CompletionBody(Writing):
    """The body of `/v1/completions`."""

    prompt: Any
    logprobs: int | None = None
    add_special_tokens: bool | None = None

    @field_validator("prompt")
    @classmethod
    def _is_prompt(cls, value: Any) -> Any:
        if not (_is_text_or_ids(value) or _is_list_of_them(value)):
            raise ValueError("expected a text, a list of token ids, or a list of texts or of lists of token ids")
        return value

    @property
    def prompts(self) -> list[str | Ids]:
        """Each prompt, as text or ids."""
        return [self.prompt] if _is_text_or_ids(self.prompt) else self.prompt


class TokenizeBody(Body):
    """The body of `/tokenize`: a text, which llama-server calls `content`, or messages."""

    prompt: str | None = None
    content: str | None = None
    messages: Messages | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_special_tokens: bool | None = None


class RestoreBody(Body):
    """The body of `/cache/restore`."""

    name: str = Field(pattern=_NAME)


class SaveBody(TokenizeBody):
    """The body of `/cache/save`: a prompt as in `/tokenize`, and the name that it gets."""

    name: str = Field(pattern=_NAME)


class DetokenizeBody(Body):
    """The body of `/detokenize`."""

    tokens: Ids


class TemplateBody(Body):
    """The body of `/apply-template`."""

    messages: Messages
    chat_template_kwargs: dict[str, Any] | None = None


class EmbeddingBody(Body):
    """The body of `/v1/embeddings`."""

    input: Any
    dimensions: int | None = None
    encoding_format: Literal["float", "base64"] | None = None
    prompt_name: str | None = None

    @field_validator("input")
    @classmethod
    def _is_input(cls, value: Any) -> Any:
        if not (_is_text_or_ids(value) or _is_list_of_them(value)):
            raise ValueError("expected a text, a list of token ids, or a list of texts or of lists of token ids")
        return value

    @property
    def inputs(self) -> list[str | Ids]:
        """Each input, as text or ids."""
        return [self.input] if _is_text_or_ids(self.input) else self.input


class Document(BaseModel):
    """A text to rank, as an object."""

    model_config = ConfigDict(strict=True, extra="forbid")

    text: str


class RerankBody(Body):
    """The body of `/rerank`."""

    query: str
    documents: list[str | Document] = Field(min_length=1)
    top_n: int | None = Field(None, ge=1)
    return_documents: bool | None = None

    @property
    def texts(self) -> list[str]:
        """The documents as texts."""
        return [each if isinstance(each, str) else each.text for each in self.documents]


Parsed = TypeVar("Parsed", bound=Body)


def parse(schema: type[Parsed], data: bytes) -> Parsed:
    """The body of a request, checked.

    Raises:
        ApiError: 400 for what is no JSON, has values of other types, or fields that mean something else than is done.
    """
    try:
        body = schema.model_validate_json(data)
    except ValidationError as error:
        raise _invalid(error) from None
    for name, value in (body.model_extra or {}).items():
        _check_extra(name, value, schema)
    return body


def _check_extra(name: str, value: Any, schema: type[Body]) -> None:
    if name in _IGNORED or (name in _NEUTRAL and (value is None or value in _NEUTRAL[name])):
        return
    if name in _NEUTRAL:
        raise ApiError(
            400, f"{name} is not supported by this server: leave it out", code="unsupported_parameter", param=name
        )
    known = ", ".join(schema.model_fields)
    raise ApiError(
        400,
        f"the request has the field {name[:40]!r}, which this server does not know, expected of: {known}",
        code="unknown_parameter",
        param=name[:40],
    )


def _invalid(error: ValidationError) -> ApiError:
    """The first of what is wrong; what was sent is not repeated."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON ({first['msg'].partition(': ')[2]})", code="invalid_json")
    place = ".".join(map(str, first["loc"]))[:200]
    if not place:
        return ApiError(400, "the body is no JSON object, expected one with the fields of the request")
    what = first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        return ApiError(400, f"the request lacks {place}", code="missing_required_parameter", param=place)
    return ApiError(400, f"{place}: {what[:1].lower()}{what[1:]}", code="invalid_type", param=str(first["loc"][0]))


def _is_text_or_ids(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and bool(value) and all(type(x) is int for x in value))


def _is_list_of_them(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_text_or_ids, value))
