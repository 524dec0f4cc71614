"""Configurations that an evaluation refuses."""

import pytest

import iceformer
from iceformer.evaluate.configuration import REFERENCE, Configuration, with_reference


def test_refuses_configurations() -> None:
    with pytest.raises(ValueError, match="is empty, expected at least one"):
        with_reference({})
    for name in ("", " ", REFERENCE):
        with pytest.raises(ValueError, match="has the name"):
            with_reference({name: Configuration()})
    with pytest.raises(ValueError, match="weights is 'int3'"):
        Configuration(weights="int3")
    with pytest.raises(ValueError, match="kv_dtype is 'int4'"):
        Configuration(kv_dtype="int4")
    with pytest.raises(ValueError, match="for new tokens"):
        Configuration(iceformer.DecodeSelection())
