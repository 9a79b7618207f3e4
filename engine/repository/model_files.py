"""The files of a model that the server itself reads or resolves: labels, warm-up data, initial states, model files.

All of them lie in the model's directory, and no link leads out of the repository (spec C-039).
"""

from __future__ import annotations

import os

from forebay.engine.repository.beneath import Beneath, Refused, check_relative
from forebay.engine.repository.config_problem import Problem
from forebay.engine.repository.model_config_schema import ModelConfig
from forebay.ipc.errors import Internal, NotFound

#: Bytes of one label file; a million classes fit.
MAX_LABEL_BYTES = 64 * 1024 * 1024

#: Bytes of one warm-up or initial-state file.
MAX_TENSOR_FILE_BYTES = 1 << 30


def read_labels(model_path: str, repository: str, filename: str) -> tuple[str, ...]:
    """Return the labels of an output, one per line (spec H-173).

    Args:
        model_path: the model directory.
        repository: the repository that a link must not leave.
        filename: ``label_filename`` of the configuration.

    Raises:
        Refused: the name leads out of the model directory, or a link out of the repository.
        Internal: there is no such file.
    """
    data = read_model_file(model_path, repository, filename, MAX_LABEL_BYTES)
    return tuple(line.rstrip("\r") for line in data.decode(errors="replace").removesuffix("\n").split("\n"))


def read_model_file(model_path: str, repository: str, filename: str, max_bytes: int = MAX_TENSOR_FILE_BYTES) -> bytes:
    """Return a file of a model directory: labels, warm-up data, initial state.

    Raises:
        Refused: the name leads out of the model directory, a link out of the repository, or the file is too large.
        Internal: there is no such file.
    """
    names = check_relative(filename)
    with Beneath(repository) as root:
        try:
            return root.read((*_below(root, model_path), *names), max_bytes)
        except NotFound as error:
            raise missing_file(f"{os.path.basename(model_path)}/{filename}", error) from None


def missing_file(shown: str, error: NotFound) -> Internal:
    """Return the error of a file that a configuration names and that is not there (`ReadTextFile`)."""
    return Internal(f"failed to open text file for read {shown}: {error.text.rpartition(': ')[2]}")


def resolve_model_file(model_path: str, repository: str, filename: str) -> str | None:
    """Return the real path of a file or directory of a model, or None if it is not there.

    For backends, whose libraries open files by name: ``default_model_filename`` below a version directory, or a custom
    operator library.

    Raises:
        Refused: the name leads out of the model directory, or a link out of the repository.
    """
    names = check_relative(filename)
    with Beneath(repository) as root:
        path = (*_below(root, model_path), *names)
        return root.real_path(path) if root.entry(path) is not None else None


def file_problems(config: ModelConfig) -> list[Problem]:
    """Names of files in the configuration must stay inside the model directory (spec C-039)."""
    message = config.message
    named: list[tuple[tuple[str | int, ...], str]] = [
        (("output", index, "label_filename"), output.label_filename) for index, output in enumerate(message.output)
    ]
    named.append((("default_model_filename",), message.default_model_filename))
    named += [(("cc_model_filenames", key), message.cc_model_filenames[key]) for key in message.cc_model_filenames]
    named += [
        (("model_operations", "op_library_filename", index), filename)
        for index, filename in enumerate(message.model_operations.op_library_filename)
    ]
    for index, sample in enumerate(message.model_warmup):
        named += [
            (("model_warmup", index, "inputs", key, "input_data_file"), sample.inputs[key].input_data_file)
            for key in sample.inputs
        ]
    for index, state in enumerate(message.sequence_batching.state):
        named += [
            (("sequence_batching", "state", index, "initial_state", number, "data_file"), initial.data_file)
            for number, initial in enumerate(state.initial_state)
        ]
    problems: list[Problem] = []
    for path, filename in named:
        if not filename:
            continue
        try:
            check_relative(filename, str(path[-1]) if not isinstance(path[-1], int) else str(path[-2]))
        except Refused as error:
            problems.append(Problem(error.text, path, written=filename).located(config.source))
    return problems


def _below(root: Beneath, model_path: str) -> tuple[str, ...]:
    """Return the names from the repository to a model directory.

    Raises:
        Refused: the directory is not in the repository.
    """
    relative = os.path.relpath(os.path.realpath(model_path), root.real_root)
    if relative == "..":
        raise Refused("the model directory is not in the model repository")
    return check_relative(relative, "model directory")
