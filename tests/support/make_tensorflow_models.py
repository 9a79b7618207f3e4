"""Writes the TensorFlow models of the tests: ``python make_tensorflow_models.py FOLDER``.

A process of its own: TensorFlow starts threads and warns a lot.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["CUDA_VISIBLE_DEVICES"] = "-1"

import tensorflow as tf


class Linear(tf.Module):  # type: ignore[misc]
    """A matrix product, a signature with strings, and one in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = tf.Variable([[1.0, 2.0], [3.0, 4.0]])

    @tf.function(input_signature=[tf.TensorSpec([None, 2], tf.float32, name="x")])  # type: ignore[untyped-decorator]
    def product(self, x: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"y": x @ self.weight, "sum": tf.reduce_sum(x, axis=1)}

    @tf.function(  # type: ignore[untyped-decorator]
        input_signature=[
            tf.TensorSpec([None], tf.string, name="left"),
            tf.TensorSpec([None], tf.string, name="right"),
        ]
    )
    def join(self, left: tf.Tensor, right: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"joined": tf.strings.join([left, right], "-")}

    @tf.function(input_signature=[tf.TensorSpec([None], tf.bfloat16, name="x")])  # type: ignore[untyped-decorator]
    def negative(self, x: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"y": -x}

    @tf.function(input_signature=[tf.TensorSpec([], tf.float32, name="x")])  # type: ignore[untyped-decorator]
    def half(self, x: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"y": x / 2}


def main(folder: Path) -> None:
    """Write ``linear/1/model.savedmodel`` and ``graph/1/model.graphdef``."""
    model = Linear()
    tf.saved_model.save(
        model,
        str(folder / "linear" / "1" / "model.savedmodel"),
        signatures={
            "serving_default": model.product,
            "join": model.join,
            "negative": model.negative,
            "half": model.half,
        },
    )
    graph = tf.Graph()
    with graph.as_default():
        x = tf.compat.v1.placeholder(tf.float32, [None, 2], name="x")
        tf.identity(x * 3.0, name="y")
    path = folder / "graph" / "1" / "model.graphdef"
    path.parent.mkdir(parents=True)
    path.write_bytes(graph.as_graph_def().SerializeToString())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
