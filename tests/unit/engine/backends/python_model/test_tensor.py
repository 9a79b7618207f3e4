"""``pb_utils.Tensor`` on a GPU, which the host plays (spec P-051..P-054)."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
from gpu_tensors import GpuTensor

from forebay.engine.backends.python_model import dlpack, tensor
from forebay.engine.backends.python_model.errors import TritonModelException
from forebay.engine.backends.python_model.gpus import Gpus
from forebay.engine.backends.python_model.tensor import Tensor
from forebay.engine.devices.opening import PLAYED_GPUS_VARIABLE

VALUES = np.arange(6, dtype=np.float32).reshape(2, 3)


@pytest.fixture(autouse=True)
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> Gpus:
    monkeypatch.setenv(PLAYED_GPUS_VARIABLE, "2")
    found = Gpus()
    monkeypatch.setattr(tensor, "gpus", found)
    return found


def test_a_tensor_of_a_gpu_stays_there() -> None:
    made = Tensor.from_dlpack("X", GpuTensor(VALUES, 1))
    assert (made.is_cpu(), made.shape(), made.triton_dtype()) == (False, [2, 3], 11)
    assert made.__dlpack_device__() == (2, 1)
    with pytest.raises(TritonModelException, match=r"^Tensor is stored in GPU and cannot be converted to NumPy\.$"):
        made.as_numpy()
    back = GpuTensor.from_dlpack(made)
    assert back.device_id == 1
    assert np.shares_memory(back.array, VALUES)


def test_a_bare_capsule_says_itself_where_it_is() -> None:
    made = Tensor.from_dlpack("X", GpuTensor(VALUES).__dlpack__())
    assert not made.is_cpu()
    capsule = made.to_dlpack()
    assert dlpack.device_of(capsule) == (2, 0)
    assert Tensor.from_dlpack("X", VALUES.__dlpack__()).is_cpu()


def test_what_the_host_needs_is_copied_and_counted(two_gpus: Gpus) -> None:
    made = Tensor.from_dlpack("X", GpuTensor(VALUES))
    np.testing.assert_array_equal(made.data, VALUES)
    assert not np.shares_memory(made.data, VALUES)
    gpu = two_gpus.find(0)
    assert gpu is not None
    assert gpu.device.traffic.bytes_out == 2 * VALUES.nbytes


def test_memory_is_kept_as_long_as_anybody_has_it() -> None:
    source = np.ones(4, np.float32)
    alive = weakref.ref(source)
    made = Tensor.from_dlpack("X", GpuTensor(source))
    back = GpuTensor.from_dlpack(made)
    del source, made
    gc.collect()
    assert alive() is not None
    del back
    gc.collect()
    assert alive() is None


def test_a_gpu_that_cannot_be_used_here_is_left_to_its_library() -> None:
    class WithCopy(GpuTensor):
        def cpu(self) -> np.ndarray:
            return self.array

    made = Tensor.from_dlpack("X", WithCopy(VALUES, 7))
    assert made.is_cpu()
    np.testing.assert_array_equal(made.as_numpy(), VALUES)
    with pytest.raises(TritonModelException, match="offers neither"):
        Tensor.from_dlpack("X", GpuTensor(VALUES, 7))
    with pytest.raises(TritonModelException, match="cannot be used here"):
        Tensor.from_dlpack("X", GpuTensor(VALUES, 7).__dlpack__())


def test_only_c_order() -> None:
    """P-054."""
    with pytest.raises(TritonModelException, match=r"^DLPack tensor is not contiguous\. Only contiguous"):
        Tensor.from_dlpack("X", GpuTensor(VALUES.T))


def test_a_tensor_without_elements() -> None:
    made = Tensor.from_dlpack("X", GpuTensor(np.empty((0, 3), np.float32)))
    assert (made.is_cpu(), made.shape()) == (False, [0, 3])
    assert GpuTensor.from_dlpack(made).array.shape == (0, 3)
    assert made.data.shape == (0, 3)


def test_bfloat16_on_a_gpu() -> None:
    bits = np.array([0x3F80, 0x4000], np.uint16)

    class Bfloat(GpuTensor):
        def __dlpack__(self, *, stream: int | None = None) -> object:
            return dlpack.give(self.array, is_bfloat=True, device_id=self.device_id)

    made = Tensor.from_dlpack("X", Bfloat(bits))
    assert made.datatype == "BF16"
    array, is_bfloat = dlpack.take(made.to_dlpack())
    assert is_bfloat
    np.testing.assert_array_equal(array, bits)
