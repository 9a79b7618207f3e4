"""What the log says about models that do not load: each kind of bad file has its advice."""

from __future__ import annotations

import pytest

from forebay.engine.supervisor.load_advice import load_advice


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("ModuleNotFoundError: No module named 'a.b'\n\nAt:\n  m/1/model.py(1): <module>\n", "what has 'a.b'"),
        ("SyntaxError: expected ':' (model.py, line 2)", "py_compile"),
        ("AttributeError: module '1.model' has no attribute 'TritonPythonModel'", "class TritonPythonModel"),
        ("ValueError: no weights\n\nAt:\n  m/1/model.py(5): initialize\n", "own code"),
        ("the process of m:1 #0 ended with exit code 3 while it looked at the model", "ended the process"),
        ("INVALID_PROTOBUF : Load model from 1/model.onnx failed:Protobuf parsing failed.", "incomplete"),
        ("Opset 99 is under development and support for this is limited.", "newer onnxruntime"),
        ("Fatal error: my.ops:Magic(-1) is not a registered function/op", "op_library_filename"),
        ("configuration expects datatype TYPE_FP32 for input 'X', model provides TYPE_INT64", "config.pbtxt"),
        ("unable to find '1/model.py' for model instance 'm_0'", "default_model_filename"),
        ("something else", ""),
    ],
)
def test_says_what_to_do(text: str, advice: str) -> None:
    found = load_advice(text)
    assert advice in found
    assert bool(found) == bool(advice)
