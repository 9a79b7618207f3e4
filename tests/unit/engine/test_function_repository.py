"""The repository that ``forebay serve module:function`` makes."""

from __future__ import annotations

from pathlib import Path

import pytest

from forebay.engine.function_repository import BACKEND_NAME, write_function_repository
from forebay.engine.repository.repository import ModelRepository
from forebay.ipc.errors import InvalidArgument


def test_each_function_is_a_model(tmp_path: Path) -> None:
    odd = '/has "quotes", a \\ and żółć'
    write_function_repository(str(tmp_path / "functions"), ("a.b:first", "c:Second.third", "a.b:first"), odd)
    found = ModelRepository([str(tmp_path / "functions")]).scan()
    assert [model.name for model in found] == ["first", "third"]
    config = found[1].usable_config
    assert config.backend == BACKEND_NAME
    parameters = {key: value.string_value for key, value in config.message.parameters.items()}
    assert parameters == {"function": "c:Second.third", "directory": odd}
    assert found[1].versions.numbers == (1,)


def test_two_functions_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="'a:f' and 'b:f' would both be served as model 'f'"):
        write_function_repository(str(tmp_path / "functions"), ("a:f", "b:f"), "/")
