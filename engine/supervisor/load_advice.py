"""What to do about a model that does not load, by the words of whoever refused it; for the log.

The reason in the repository index is Triton's own text, which says what is wrong and not what to do.
"""

from __future__ import annotations

import re

#: Words of an error, and what to do; ``\\1`` is what they name. The first that fit count.
_ADVICE = tuple(
    (re.compile(words), advice)
    for words, advice in (
        (
            r"ModuleNotFoundError: No module named '([^']+)'",
            r"Install what has '\1' where the server is installed, or give the model an environment of its own: "
            "parameter EXECUTION_ENV_PATH.",
        ),
        (r"SyntaxError|IndentationError|TabError", "Correct that line; python -m py_compile <file> checks it."),
        (r"has no attribute 'TritonPythonModel'", "The file must define a class TritonPythonModel with execute()."),
        (r"\nAt:\n", "The model's own code has raised it, in the first of these lines."),
        (
            r"ended with (?:exit code|signal)",
            "The model's own code, or a library that it uses, has ended the process: see what it has written above.",
        ),
        (
            r"Protobuf parsing failed|No graph was found|is not a TorchScript file",
            "The file is of another kind or incomplete: copy it again, and compare its size with the original's.",
        ),
        (
            r"[Oo]pset|IR version",
            "Export the model for an older version of the format, or install a newer onnxruntime.",
        ),
        (
            r"is not a registered function/op",
            "Name the library that has the operator: model_operations { op_library_filename: ... }.",
        ),
        (
            r"model expects|model provides|allowed (?:in|out)puts are",
            "Correct config.pbtxt, or leave inputs and outputs out of it: they are then taken from the model.",
        ),
        (r"unable to find '", "Put the file there, or name another one: default_model_filename in config.pbtxt."),
    )
)


def load_advice(text: str) -> str:
    """Return what to do about an error with this text, empty if that is not known."""
    for words, advice in _ADVICE:
        found = words.search(text)
        if found:
            return found.expand(advice)
    return ""
