"""The schema of spec 05, in a pool of its own."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from forebay.engine.repository import make_schema
from forebay.engine.repository import model_config_schema as schema


@pytest.mark.parametrize(
    ("message", "field", "number"),
    [
        ("ModelConfig", "runtime", 25),
        ("ModelConfig", "model_metrics", 26),
        ("ModelConfig", "response_cache", 24),
        ("ModelConfig", "model_repository_agents", 23),
        ("ModelConfig", "model_transaction_policy", 19),
        ("ModelConfig", "batch_input", 20),
        ("ModelConfig", "batch_output", 21),
        ("ModelConfig", "model_operations", 18),
        ("ModelSequenceBatching", "iterative_sequence", 6),
        ("ModelSequenceBatching.State", "use_growable_memory", 7),
        ("ModelSequenceBatching.State", "use_same_buffer_for_input_output", 6),
        ("ModelOptimizationPolicy.Cuda", "graph_spec", 3),
        ("ModelEnsembling", "max_inflight_requests", 2),
        ("ModelEnsembling.Step", "model_namespace", 5),
        ("ModelInput", "is_non_linear_format_io", 9),
        ("ModelWarmup", "count", 4),
        ("ModelInstanceGroup", "host_policy", 9),
    ],
)
def test_the_fields_of_current_triton_exist(message: str, field: str, number: int) -> None:
    """Spec 5.1: numbers as in model_config.proto."""
    assert schema.message_class(message).DESCRIPTOR.fields_by_name[field].number == number


def test_datatypes_have_the_numbers_of_the_protocol() -> None:
    """Spec D-002."""
    assert schema.enum_number("DataType", "TYPE_FP32") == 11
    assert schema.enum_name("DataType", 13) == "TYPE_STRING"
    assert schema.enum_name("DataType", 99) == "99"


def test_it_lives_beside_tritonclients_own_copy() -> None:
    """Two files that define package ``inference`` collide only in one pool."""
    model_config_pb2 = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    theirs = model_config_pb2.ModelConfig(name="m", max_batch_size=3)
    ours = schema.ModelConfig.from_bytes(theirs.SerializeToString())
    assert (ours.name, ours.max_batch_size) == ("m", 3)
    assert ours.to_bytes() == theirs.SerializeToString(deterministic=True)


def test_nothing_that_the_client_knows_is_missing() -> None:
    """A tritonclient with a longer schema fails here, and ``make_schema`` mends it; an older one may know less."""
    model_config_pb2 = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    pending = [(model_config_pb2.ModelConfig.DESCRIPTOR, schema.message_class("ModelConfig").DESCRIPTOR)]
    seen: set[str] = set()
    while pending:
        theirs, ours = pending.pop()
        if theirs.full_name in seen:
            continue
        seen.add(theirs.full_name)
        for name, field in theirs.fields_by_name.items():
            own = ours.fields_by_name[name]
            assert (own.number, own.type) == (field.number, field.type), f"{theirs.full_name}.{name}"
            if field.message_type is not None:
                pending.append((field.message_type, own.message_type))


def test_the_text_of_the_schema_says_what_the_binary_says() -> None:
    descriptor_pb2 = importlib.import_module("google.protobuf.descriptor_pb2")
    binary = (make_schema.FOLDER / "model_config.binpb").read_bytes()
    (file,) = descriptor_pb2.FileDescriptorSet.FromString(binary).file
    assert (make_schema.FOLDER / "model_config.proto").read_text() == make_schema.proto_text(file)


def test_configs_compare_by_value_and_copies_are_independent() -> None:
    config = schema.ModelConfig()
    config.message.name = "a"
    copy = config.copy()
    assert copy == config
    copy.message.name = "b"
    assert copy != config
    assert config.name == "a"


def test_threads_that_come_first_together_share_one_pool() -> None:
    """Two pools would make message classes that cannot be copied into each other."""
    code = """
import concurrent.futures, sys
from forebay.engine.repository.config import parse_config_text
from forebay.engine.repository.auto_complete import merge_completed
with concurrent.futures.ThreadPoolExecutor(8) as pool:
    configs = list(pool.map(lambda n: parse_config_text('backend: "x" input { name: "i" }'), range(8)))
for config in configs:
    merge_completed(configs[0], config)
"""
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0
