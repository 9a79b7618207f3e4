"""The codec around an identity model answers like Triton 2.51 did, byte for byte.

`triton_2_51_answers.jsonl` was recorded from a running server whose Python models return their inputs. Where we answer
otherwise on purpose the line says what (`we_answer`) and why (`because`).
"""

import json
from pathlib import Path

import pytest

from forebay.frontend.codec.compression import decompress, request_encoding
from forebay.frontend.codec.generate import (
    check_generate_encoding,
    parse_generate_request,
    render_generate_reply,
    server_sent_event,
)
from forebay.frontend.codec.infer_request import JsonData, RegionData, decode_infer_request, parse_header_length
from forebay.frontend.codec.infer_response import OutputTensor, classify, render_infer_response
from forebay.frontend.codec.validation import validate_infer
from forebay.frontend.errors import error_body, http_status
from forebay.ipc.errors import NotFound, ServingError

LIMIT = 1 << 26
RECORDS = [json.loads(line) for line in Path(__file__).with_name("triton_2_51_answers.jsonl").read_text().splitlines()]
MODELS = {
    "f32": ([("FP32", (-1,))], 0, 99),
    "f16": ([("FP16", (-1,))], 0, 99),
    "str": ([("BYTES", (-1,))], 0, 99),
    "by1": ([("BYTES", (1,))], 0, 99),
    "dyn2": ([("FP32", (-1, -1))], 0, 99),
    "fix": ([("FP32", (2, 2))], 0, 99),
    "two": ([("FP32", (2,)), ("INT32", (-1,))], 4, 99),
    "opt": ([("FP32", (-1,)), ("BYTES", (-1,))], 4, 1),
    "req": ([("FP32", (-1,)), ("FP32", (-1,)), ("INT32", (-1,))], 2, 99),
    "many": ([(name, (-1,)) for name in ("UINT8", "INT8", "INT64", "UINT64", "FP64", "BOOL")], 0, 1),
}


def infer(entry, body, headers):
    body = decompress(body, request_encoding(headers.get("Content-Encoding")), max_bytes=LIMIT)
    json_bytes = parse_header_length(headers.get("Inference-Header-Content-Length"), len(body))
    request = decode_infer_request(entry, body, json_bytes, max_json_bytes=LIMIT)
    sources = [tensor.source for tensor in request.inputs] + [output.region for output in request.outputs]
    for source in sources:
        if isinstance(source, RegionData):
            raise NotFound(f"Unable to find shared memory region: '{source.region}'")
    validate_infer(entry, request, body)
    tensors = {tensor.name.replace("IN", "OUT"): tensor for tensor in request.inputs}
    outputs = []
    for plan in request.output_plan(entry):
        if plan.name not in tensors:
            continue
        tensor = tensors[plan.name]
        place = tensor.source
        data = (
            place.data
            if isinstance(place, JsonData)
            else place.prefix + bytes(body[place.offset : place.offset + place.body_bytes])
        )
        if plan.classification:
            output = classify(
                plan.name,
                tensor.datatype,
                tensor.shape,
                data,
                plan.classification,
                ("cat", "dog"),
                is_batched=entry.max_batch_size > 0,
                binary=plan.binary,
            )
        else:
            output = OutputTensor(plan.name, tensor.datatype, tensor.shape, data, plan.binary)
        outputs.append(output)
    return render_infer_response(entry.name, 1, request.id, {}, outputs)


def generate(entry, body, headers):
    check_generate_encoding(headers.get("Content-Encoding"))
    request = parse_generate_request(entry, body, max_json_bytes=LIMIT)
    validate_infer(entry, request, b"")
    outputs = [
        OutputTensor(tensor.name.replace("IN", "OUT"), tensor.datatype, tensor.shape, tensor.source.data)
        for tensor in request.inputs
    ]
    return render_generate_reply(entry.name, 1, request.id, {}, outputs)


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: f"{record['path'][11:]}:{record['body'][:60]!r}")
def test_answers_like_the_recorded_server(record, model):
    """Spec H-060..H-134, H-140, H-150..H-157, H-170..H-174, H-270..H-281."""
    _, _, _, name, kind = record["path"].split("/")
    tensors, max_batch_size, optional_from = MODELS[name]
    entry = model(name, tensors, max_batch_size, optional_from=optional_from)
    headers, body = record.get("headers", {}), record["body"].encode("latin1")
    reply = None
    try:
        if kind == "infer":
            reply = infer(entry, body, headers)
            status, content = 200, b"".join(reply.buffers)
        else:
            status, content = 200, generate(entry, body, headers)
            content = server_sent_event(content) if kind == "generate_stream" else content
    except ServingError as error:
        status, content = http_status(error), error_body(error.text)
    expected = record.get("we_answer", [record["status"], record["reply"]])
    assert [status, content.decode("latin1")] == expected
    if reply is not None and "we_answer" not in record:
        assert reply.header_length == record.get("header_length")
        assert reply.content_type == record.get("content_type", "application/json")


def test_deviations_are_few_and_explained():
    deviating = [record for record in RECORDS if "we_answer" in record]
    assert all(record["because"] for record in deviating)
    assert len(deviating) * 8 < len(RECORDS)
