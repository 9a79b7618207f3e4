"""From bytes to what magika's network reads: the first and the last bytes, as its authors cut them."""

import numpy as np
import triton_python_backend_utils as pb_utils

#: Bytes looked at on each side, and how many of them are kept.
BLOCK_BYTES = 4096
KEPT_BYTES = 1024

#: Stands for a byte that is not there.
PADDING = 256


def features(content):
    """Return the features of one file: int32 [2 * KEPT_BYTES].

    Args:
        content: bytes.
    """
    row = np.full(2 * KEPT_BYTES, PADDING, np.int32)
    beginning = content[:BLOCK_BYTES].lstrip()[:KEPT_BYTES]
    end = content[-BLOCK_BYTES:].rstrip()[-KEPT_BYTES:]
    row[: len(beginning)] = np.frombuffer(beginning, np.uint8)
    if end:
        row[-len(end) :] = np.frombuffer(end, np.uint8)
    return row


class TritonPythonModel:
    def execute(self, requests):
        responses = []
        for request in requests:
            contents = pb_utils.get_input_tensor_by_name(request, "content").as_numpy()
            rows = np.stack([features(content) for content in contents.ravel()])
            responses.append(pb_utils.InferenceResponse([pb_utils.Tensor("bytes", rows)]))
        return responses
