"""From scores to words, by the rules that magika's own client has for unsure answers and very small files."""

import importlib.metadata
import json

import numpy as np
import triton_python_backend_utils as pb_utils

#: Where the network's labels, thresholds and the table of content types lie in the package.
NETWORK_CONFIG = "magika/models/standard_v3_3/config.min.json"
CONTENT_TYPES = "magika/config/content_types_kb.min.json"


def read_packaged(path):
    """Return a JSON file of the magika package."""
    return json.loads(importlib.metadata.distribution("magika").locate_file(path).read_text())


class TritonPythonModel:
    def initialize(self, args):
        network = read_packaged(NETWORK_CONFIG)
        self.kinds = read_packaged(CONTENT_TYPES)
        self.labels = network["target_labels_space"]
        self.thresholds = network["thresholds"]
        self.default_threshold = network["medium_confidence_threshold"]
        self.replaced = network["overwrite_map"]
        self.small_bytes = network["min_file_size_for_dl"]
        self.block_bytes = network["block_size"]

    def execute(self, requests):
        responses = []
        for request in requests:
            contents = pb_utils.get_input_tensor_by_name(request, "content").as_numpy()
            scores = pb_utils.get_input_tensor_by_name(request, "scores").as_numpy()
            best = scores.argmax(axis=1)
            answers = [
                self.judge(content, self.labels[index], float(row[index]))
                for content, index, row in zip(contents.ravel(), best, scores, strict=True)
            ]
            labels = np.array([[label.encode()] for label, _score in answers], object)
            types = np.array([[self.kinds[label]["mime_type"].encode()] for label, _score in answers], object)
            certain = np.array([[score] for _label, score in answers], np.float32)
            tensors = [
                pb_utils.Tensor("label", labels),
                pb_utils.Tensor("mime_type", types),
                pb_utils.Tensor("score", certain),
            ]
            wanted = request.requested_output_names()
            responses.append(pb_utils.InferenceResponse([tensor for tensor in tensors if tensor.name() in wanted]))
        return responses

    def judge(self, content, label, score):
        """Return (label, probability) for one file."""
        if not content:
            return "empty", 1.0
        if len(content) < self.small_bytes or len(content[: self.block_bytes].lstrip()) < self.small_bytes:
            return self.judge_few(content[: self.block_bytes]), 1.0
        answer = self.replaced.get(label, label)
        if score < self.thresholds.get(label, self.default_threshold):
            answer = "txt" if self.kinds[answer]["is_text"] else "unknown"
        return answer, score

    def judge_few(self, content):
        """Return a label for what is too short for the network."""
        try:
            content.decode()
        except UnicodeDecodeError:
            return "unknown"
        return "txt"
