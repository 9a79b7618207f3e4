"""An image model of ResNet-50's size, made here, so that nothing has to be fetched to measure a GPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

#: Blocks of each stage, as ResNet-50 has them, and of one that a CPU runs in a moment.
RESNET50 = (3, 4, 6, 3)
SMALL = (1, 1)

CLASSES = 1000


class _Builder:
    """Collects nodes and weights."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self._random = np.random.default_rng(50)
        self._count = 0

    def node(self, operator: str, *inputs: str, output: str = "", **attributes: object) -> str:
        self._count += 1
        name = output or f"t{self._count}"
        self.nodes.append(helper.make_node(operator, list(inputs), [name], **attributes))
        return name

    def weight(self, *shape: int, scale: float = 1.0) -> str:
        self._count += 1
        values: NDArray[np.float32] = self._random.standard_normal(shape, np.float32) * np.float32(scale)
        name = f"w{self._count}"
        self.weights.append(numpy_helper.from_array(values, name))
        return name

    def convolution(self, source: str, channels: int, filters: int, size: int, stride: int = 1) -> str:
        """Return a convolution with its (folded) batch normalisation."""
        fan_in = channels * size * size
        weight, bias = self.weight(filters, channels, size, size, scale=fan_in**-0.5), self.weight(filters, scale=0.01)
        pad = size // 2
        return self.node("Conv", source, weight, bias, strides=[stride, stride], pads=[pad] * 4)

    def bottleneck(self, source: str, channels: int, width: int, stride: int) -> str:
        """Return a block of three convolutions beside its short cut; 4 * width channels."""
        inner = self.node("Relu", self.convolution(source, channels, width, 1))
        inner = self.node("Relu", self.convolution(inner, width, width, 3, stride))
        inner = self.convolution(inner, width, 4 * width, 1)
        short_cut = source
        if stride != 1 or channels != 4 * width:
            short_cut = self.convolution(source, channels, 4 * width, 1, stride)
        return self.node("Relu", self.node("Add", inner, short_cut))


def write_image_model(path: Path, blocks: tuple[int, ...], pixels: int) -> int:
    """Write a model: ``image`` float32 [n, 3, pixels, pixels] to ``scores`` float32 [n, 1000].

    Returns:
        How many parameters it has; 25.5 million with the blocks of ResNet-50.
    """
    builder = _Builder()
    source = builder.node("Relu", builder.convolution("image", 3, 64, 7, 2))
    source = builder.node("MaxPool", source, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    channels = 64
    for stage, count in enumerate(blocks):
        width = 64 << stage
        for block in range(count):
            source = builder.bottleneck(source, channels, width, 2 if stage > 0 and block == 0 else 1)
            channels = 4 * width
    source = builder.node("Flatten", builder.node("GlobalAveragePool", source))
    head = builder.weight(channels, CLASSES, scale=channels**-0.5)
    builder.node("Gemm", source, head, builder.weight(CLASSES, scale=0.01), output="scores")
    graph = helper.make_graph(
        builder.nodes,
        "image_model",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ("n", 3, pixels, pixels))],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ("n", CLASSES))],
        builder.weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)
    return sum(int(np.prod(weight.dims)) for weight in builder.weights)
