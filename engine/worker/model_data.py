"""Files with tensors beside a model: samples of its warm-up, and what its sequences begin with."""

from __future__ import annotations

import os

from forebay.engine.repository.beneath import Beneath, check_relative
from forebay.engine.repository.model_files import missing_file
from forebay.ipc.errors import NotFound

#: Bytes of one tensor at most; a configuration may come from a client.
TENSOR_BYTES_MAX = 1 << 30


def read_model_data(model_path: str, folder: str, filename: str) -> bytes:
    """Return the content of a file in a folder of a model's directory.

    Raises:
        Internal: it is not there.
        Refused: its name or a link leads out, or it is larger than :data:`TENSOR_BYTES_MAX`.
    """
    names = check_relative(filename)
    directory, model = os.path.split(os.path.realpath(model_path))
    # Its links may lead to files that several models share, but not out of where the models are.
    with Beneath(directory) as root:
        try:
            return root.read((model, folder, *names), TENSOR_BYTES_MAX)
        except NotFound as error:
            raise missing_file(f"{model}/{folder}/{filename}", error) from None
