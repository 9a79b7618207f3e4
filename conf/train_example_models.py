"""Fit and write the example model repository ``conf/models``; run by hand, its output is committed.

    python conf/train_example_models.py [--output conf/models]

Both models are fitted on data that the scikit-learn package ships, so nothing is downloaded:

``alpha_model`` (ONNX)
    The *probability that a handwritten digit is odd* (1, 3, 5, 7, 9), from 50 of the 64 pixels of
    ``sklearn.datasets.load_digits`` (1,797 images of 8 x 8 pixels): the 50 pixels that vary most, each scaled to mean 0
    and standard deviation 1 over the training images. A 50-64-32-1 multi-layer perceptron, ReLU inside and a sigmoid at
    the end. Version 1 saw 150 training images, version 2 all 1,347. On the same 450 held-out images version 1 is right
    on 93.8 % and version 2 on 97.6 %.

``risk_model`` (TorchScript, written only where torch is installed)
    The *probability that a breast tumour is malignant*, from the 30 measurements of
    ``sklearn.datasets.load_breast_cancer`` (569 tumours) followed by the squares of the first 20 (10 means and 10
    standard errors) of the already scaled measurements; all 50 are scaled to mean 0 and standard deviation 1. A
    50-16-1 perceptron. On 143 held-out tumours it is right on 98.6 %.

Every random choice has a fixed seed: the same package versions write the same weights again.
"""

from __future__ import annotations

import argparse
import io
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier
from sklearn.preprocessing import StandardScaler

SEED = 20
FEATURE_COUNT = 50
#: Training images that version 1 of alpha_model sees; version 2 sees all of them.
VERSION_1_IMAGE_COUNT = 150
#: Old enough for onnxruntime 1.20 and for the Triton releases of the same years.
ONNX_OPSET = 17
ONNX_IR_VERSION = 8


@dataclass(frozen=True, eq=False)
class Layer:
    """One dense layer: ``y = x @ weights + bias``."""

    weights: NDArray[np.float32]
    """float32 [inputs, outputs]"""
    bias: NDArray[np.float32]
    """float32 [outputs]"""


@dataclass(frozen=True, eq=False)
class Dataset:
    """Scaled features and two classes, split into a part to fit on and a part to score on."""

    train_features: NDArray[np.float32]
    """float32 [images or tumours, 50]"""
    train_labels: NDArray[np.int64]
    test_features: NDArray[np.float32]
    test_labels: NDArray[np.int64]


def odd_digits() -> Dataset:
    """Return the 50 most varying pixels of scikit-learn's digits; label 1 means that the digit is odd."""
    images, digits = load_digits(return_X_y=True)
    train, test, train_digits, test_digits = train_test_split(
        images, digits, test_size=450, random_state=SEED, stratify=digits
    )
    pixels = np.sort(np.argsort(train.var(axis=0), kind="stable")[-FEATURE_COUNT:])
    return scaled(train[:, pixels], train_digits % 2, test[:, pixels], test_digits % 2)


def malignant_tumours() -> Dataset:
    """Return 30 scaled measurements and 20 of their squares; label 1 means that the tumour is malignant."""
    measurements, benign = load_breast_cancer(return_X_y=True)
    malignant = 1 - benign
    train, test, train_labels, test_labels = train_test_split(
        measurements, malignant, test_size=143, random_state=SEED, stratify=malignant
    )
    scaler = StandardScaler().fit(train)
    train, test = scaler.transform(train), scaler.transform(test)
    squares = FEATURE_COUNT - train.shape[1]
    return scaled(
        np.hstack([train, train[:, :squares] ** 2]),
        train_labels,
        np.hstack([test, test[:, :squares] ** 2]),
        test_labels,
    )


def scaled(
    train: NDArray[np.float64],
    train_labels: NDArray[np.int64],
    test: NDArray[np.float64],
    test_labels: NDArray[np.int64],
) -> Dataset:
    """Scale every feature to mean 0 and standard deviation 1 over the training rows."""
    scaler = StandardScaler().fit(train)
    return Dataset(
        scaler.transform(train).astype(np.float32),
        train_labels,
        scaler.transform(test).astype(np.float32),
        test_labels,
    )


def fit(features: NDArray[np.float32], labels: NDArray[np.int64], hidden: tuple[int, ...]) -> list[Layer]:
    """Fit a perceptron with ReLU layers of the given widths and one sigmoid output; return its layers in order."""
    network = MLPClassifier(hidden_layer_sizes=hidden, alpha=1e-2, max_iter=1000, tol=1e-5, random_state=SEED)
    network.fit(features.astype(np.float64), labels)
    return [
        Layer(weights.astype(np.float32), bias.astype(np.float32))
        for weights, bias in zip(network.coefs_, network.intercepts_, strict=True)
    ]


def predict(layers: list[Layer], features: NDArray[np.float32]) -> NDArray[np.float32]:
    """Run the perceptron in numpy: float32 [rows, 50] to probabilities float32 [rows, 1]."""
    values = features
    for layer in layers[:-1]:
        values = np.maximum(values @ layer.weights + layer.bias, 0)
    return 1 / (1 + np.exp(-(values @ layers[-1].weights + layers[-1].bias)))


def accuracy(layers: list[Layer], dataset: Dataset) -> float:
    """Return the share of held-out rows whose class the perceptron gets right."""
    return float(np.mean((predict(layers, dataset.test_features)[:, 0] > 0.5) == dataset.test_labels))


def write_onnx(layers: list[Layer], path: Path) -> None:
    """Write ``features`` float32 [batch, 50] to ``prediction`` float32 [batch, 1] as an ONNX file."""
    nodes: list[onnx.NodeProto] = []
    initializers: list[onnx.TensorProto] = []
    value = "features"
    for number, layer in enumerate(layers, start=1):
        initializers.append(onnx.numpy_helper.from_array(layer.weights, f"weights_{number}"))
        initializers.append(onnx.numpy_helper.from_array(layer.bias, f"bias_{number}"))
        gemm_inputs = [value, f"weights_{number}", f"bias_{number}"]
        nodes.append(onnx.helper.make_node("Gemm", gemm_inputs, [f"dense_{number}"], name=f"dense_{number}"))
        is_last = number == len(layers)
        value = "prediction" if is_last else f"hidden_{number}"
        nodes.append(onnx.helper.make_node("Sigmoid" if is_last else "Relu", [f"dense_{number}"], [value], name=value))
    float32 = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        nodes,
        "alpha_model",
        [onnx.helper.make_tensor_value_info("features", float32, ["batch", FEATURE_COUNT])],
        [onnx.helper.make_tensor_value_info("prediction", float32, ["batch", 1])],
        initializers,
    )
    model = onnx.helper.make_model(
        graph,
        producer_name="conf/train_example_models.py",
        opset_imports=[onnx.helper.make_opsetid("", ONNX_OPSET)],
        ir_version=ONNX_IR_VERSION,
    )
    onnx.checker.check_model(model, full_check=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.SerializeToString(deterministic=True))


def write_torchscript(layers: list[Layer], path: Path) -> None:
    """Write the perceptron as TorchScript: one argument float32 [batch, 50], one result float32 [batch, 1].

    Raises:
        ModuleNotFoundError: torch is not installed.
    """
    import torch

    modules: list[torch.nn.Module] = []
    for layer in layers:
        linear = torch.nn.Linear(*layer.weights.shape)
        with torch.no_grad():
            linear.weight.copy_(torch.from_numpy(layer.weights.T.copy()))
            linear.bias.copy_(torch.from_numpy(layer.bias))
        modules += [linear, torch.nn.ReLU()]
    modules[-1] = torch.nn.Sigmoid()
    archive = io.BytesIO()
    with warnings.catch_warnings():
        # torch calls the whole of TorchScript deprecated; Triton's model.pt is TorchScript all the same.
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(torch.nn.Sequential(*modules).eval()), archive)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_without_debug_records(archive, path)


def write_without_debug_records(archive: io.BytesIO, path: Path) -> None:
    """Write a TorchScript zip archive less its source locations, which hold the paths of the machine that made it."""
    with zipfile.ZipFile(archive) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as target:
        for record in source.infolist():
            if not record.filename.endswith((".debug_pkl", "/.data/serialization_id")):
                # A ZipInfo of our own carries neither date nor owner of the file.
                target.writestr(zipfile.ZipInfo(record.filename), source.read(record))


def main() -> None:
    """Fit the models, write them below ``--output`` and print what they score on held-out rows."""
    parser = argparse.ArgumentParser(description="Fit and write the example model repository.")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "models", help="repository to write to")
    output: Path = parser.parse_args().output

    digits = odd_digits()
    for version, image_count in ((1, VERSION_1_IMAGE_COUNT), (2, len(digits.train_labels))):
        layers = fit(digits.train_features[:image_count], digits.train_labels[:image_count], hidden=(64, 32))
        write_onnx(layers, output / "alpha_model" / str(version) / "model.onnx")
        score = accuracy(layers, digits)
        print(
            f"alpha_model {version}: fitted on {image_count} images, "
            f"right on {score:.1%} of {len(digits.test_labels)} held-out ones"
        )

    tumours = malignant_tumours()
    layers = fit(tumours.train_features, tumours.train_labels, hidden=(16,))
    try:
        write_torchscript(layers, output / "risk_model" / "1" / "model.pt")
    except ModuleNotFoundError:
        print("risk_model: not written, torch is not installed (pip install torch)")
        return
    score = accuracy(layers, tumours)
    print(
        f"risk_model 1: fitted on {len(tumours.train_labels)} tumours, "
        f"right on {score:.1%} of {len(tumours.test_labels)} held-out ones"
    )


if __name__ == "__main__":
    main()
