"""What a config may ask for whatever the architecture."""

import pytest

from iceformer.model.registry import build


def test_code_of_an_unknown_architecture_is_named_as_not_run() -> None:
    with pytest.raises(ValueError, match=r"auto_map names code .* never run\), supported model types: .*llama"):
        build({"model_type": "mine", "auto_map": {"AutoModel": "modeling.Model"}})
    build({"model_type": "llama", "auto_map": {"AutoModel": "modeling.Model"}})
