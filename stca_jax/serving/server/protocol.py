"""The Open Inference Protocol, version 2, with the binary tensor extension (KServe, Triton).

inputs    user             BYTES [1]
          time             INT64 [1]   may be left out: now
          targets/NAME     BYTES, INT64 or FP64 [m], features of the candidates
          request/NAME     the same, [1], features of the request
outputs   TASK             FP32 [m], probabilities
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import orjson

from stca_jax.errors import UserError
from stca_jax.serving.model import ServingModel
from stca_jax.serving.score_request import ScoreRequest

HEADER_LENGTH = "inference-header-content-length"
_DTYPES = {
    "BOOL": np.bool_, "INT8": np.int8, "INT16": np.int16, "INT32": np.int32, "INT64": np.int64,
    "UINT8": np.uint8, "UINT16": np.uint16, "UINT32": np.uint32, "UINT64": np.uint64,
    "FP32": np.float32, "FP64": np.float64,
}  # fmt: skip


def metadata(model: ServingModel, name: str) -> dict[str, Any]:
    """What GET /v2/models/NAME answers."""
    levels, schema = model.info.levels, model.info.schema
    features = [(f"targets/{n}", n, -1) for n in levels["target"].names]
    features += [(f"request/{n}", n, 1) for n in levels["request"].names]
    return {
        "name": name,
        "versions": [model.info.version],
        "platform": "stca_jax",
        "inputs": [
            {"name": "user", "datatype": "BYTES", "shape": [1]},
            {"name": "time", "datatype": "INT64", "shape": [1]},
            *(
                {
                    "name": tensor,
                    "datatype": "BYTES" if schema.is_categorical(feature) else "FP64",
                    "shape": [size],
                }
                for tensor, feature, size in features
            ),
        ],
        "outputs": [{"name": t, "datatype": "FP32", "shape": [-1]} for t in schema.tasks],
    }


def read_request(body: bytes, header_length: str | None) -> tuple[ScoreRequest, dict[str, Any]]:
    """A request to score, and the JSON part of the body.

    Raises:
      UserError: the body does not follow the protocol; names the tensor.
    """
    header, binary = _split(body, header_length)
    inputs = header.get("inputs")
    if not isinstance(inputs, list) or not all(isinstance(i, dict) for i in inputs):
        raise UserError("'inputs' must be a list of tensors")
    tensors = {}
    for tensor in inputs:
        values, binary = _tensor(tensor, binary)
        tensors[str(tensor.get("name"))] = values
    if binary:
        raise UserError(f"{len(binary):,} bytes follow the last tensor: check binary_data_size")
    return _score_request(tensors), header


def user_of(body: bytes, header_length: str | None) -> str:
    """Whose request it is; no other tensor is decoded.

    Raises:
      UserError: the body does not follow the protocol; `read_request` says so too.
    """
    header, binary = _split(body, header_length)
    user, at = None, 0
    inputs = header.get("inputs")
    for tensor in inputs if isinstance(inputs, list) else []:
        size = _parameters(tensor).get("binary_data_size", 0)
        if not isinstance(size, int) or size < 0:
            raise UserError(f"a tensor has binary_data_size {size!r}")
        if isinstance(tensor, dict) and tensor.get("name") == "user":
            user = _one("user", _tensor(tensor, binary[at : at + size])[0])
        at += size
    if user is None:
        raise UserError("the input 'user' is missing")
    return str(user)


def write_answer(
    header: Mapping[str, Any],
    probabilities: Mapping[str, np.ndarray],
    name: str,
    version: str,
) -> tuple[bytes, dict[str, str]]:
    """The body of the answer and its headers; outputs as binary where the request asks for it.

    Raises:
      UserError: the request asks for an output that is no task.
    """
    default = bool(_parameters(header).get("binary_data_output", False))
    asked = header.get("outputs") or [{"name": task} for task in probabilities]
    if not isinstance(asked, list):
        raise UserError(f"'outputs' is {asked!r}; give a list of tensors, or leave it out")
    outputs, binary = [], b""
    for output in asked:
        task = output.get("name") if isinstance(output, dict) else output
        if not isinstance(task, str) or task not in probabilities:
            raise UserError(f"no output {task!r}; the outputs are {', '.join(probabilities)}")
        values = np.ascontiguousarray(probabilities[task], np.float32)
        described: dict[str, Any] = {
            "name": task, "datatype": "FP32", "shape": list(values.shape)
        }  # fmt: skip
        if _parameters(output).get("binary_data", default):
            described["parameters"] = {"binary_data_size": values.nbytes}
            binary += values.tobytes()
        else:
            described["data"] = values
        outputs.append(described)
    answer = {"model_name": name, "model_version": version, "outputs": outputs}
    if "id" in header:
        answer["id"] = header["id"]
    text = orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)
    if not binary:
        return text, {"content-type": "application/json"}
    return text + binary, {
        "content-type": "application/octet-stream",
        HEADER_LENGTH: str(len(text)),
    }


def _split(body: bytes, header_length: str | None) -> tuple[dict[str, Any], bytes]:
    length = len(body)
    if header_length is not None:
        try:
            length = int(header_length)
        except ValueError:
            length = -1
        if not 0 <= length <= len(body):
            raise UserError(f"{HEADER_LENGTH} is {header_length!r}; the body has {len(body)} bytes")
    try:
        header = orjson.loads(body[:length])
    except orjson.JSONDecodeError as error:
        raise UserError(f"the body is no JSON: {error}") from None
    if not isinstance(header, dict):
        raise UserError("the body must be a JSON object with 'inputs'")
    return header, body[length:]


def _tensor(tensor: Mapping[str, Any], binary: bytes) -> tuple[np.ndarray | list[Any], bytes]:
    """Values of a tensor of one axis, and the bytes that follow its own."""
    name, datatype = tensor.get("name"), tensor.get("datatype")
    size = _size(tensor)
    if datatype != "BYTES" and str(datatype) not in _DTYPES:
        raise UserError(f"{name!r} has datatype {datatype!r}; use BYTES, {', '.join(_DTYPES)}")
    num_bytes = _parameters(tensor).get("binary_data_size")
    if num_bytes is None:
        data = tensor.get("data")
        values = data[0] if isinstance(data, list) and data and isinstance(data[0], list) else data
        if not isinstance(values, list) or len(values) != size:
            raise UserError(f"{name!r} needs 'data', a list of {size} values, as its shape says")
        return values, binary
    if not isinstance(num_bytes, int) or not 0 <= num_bytes <= len(binary):
        raise UserError(
            f"{name!r} has binary_data_size {num_bytes!r}, but {len(binary)} bytes are left"
        )
    own, rest = binary[:num_bytes], binary[num_bytes:]
    if datatype == "BYTES":
        return _texts(str(name), own, size), rest
    dtype = np.dtype(_DTYPES[str(datatype)]).newbyteorder("<")
    if len(own) != size * dtype.itemsize:
        raise UserError(
            f"{name!r} has {len(own)} bytes; {size} values of {datatype} have "
            f"{size * dtype.itemsize}"
        )
    return np.frombuffer(own, dtype), rest


def _size(tensor: Mapping[str, Any]) -> int:
    shape = tensor.get("shape")
    sizes = shape if isinstance(shape, list) else []
    if not sizes or not all(isinstance(n, int) and n >= 0 for n in sizes):
        raise UserError(f"{tensor.get('name')!r} has shape {shape!r}; give [m]")
    if len(sizes) > 2 or (len(sizes) == 2 and sizes[0] != 1):
        raise UserError(
            f"{tensor.get('name')!r} has shape {shape}; give [m], one request at a time"
        )
    return int(sizes[-1])


def _texts(name: str, data: bytes, size: int) -> list[str]:
    """Texts, each after its length as a little-endian uint32."""
    texts: list[str] = []
    at = 0
    try:
        for _ in range(size):
            (length,) = struct.unpack_from("<I", data, at)
            if at + 4 + length > len(data):
                raise ValueError("its bytes end within a text")
            texts.append(data[at + 4 : at + 4 + length].decode())
            at += 4 + length
        if at != len(data):
            raise ValueError(f"{len(data) - at} bytes follow its last text")
    except (struct.error, ValueError) as error:
        raise UserError(
            f"{name!r} does not hold {size} texts with their lengths: {error}"
        ) from None
    return texts


def _parameters(value: Any) -> Mapping[str, Any]:
    found = value.get("parameters") if isinstance(value, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def _score_request(tensors: Mapping[str, Sequence[Any] | np.ndarray]) -> ScoreRequest:
    targets, request = {}, {}
    for name, values in tensors.items():
        level, _, feature = name.partition("/")
        if level == "targets" and feature:
            targets[feature] = values
        elif level == "request" and feature:
            request[feature] = _one(name, values)
        elif name not in ("user", "time"):
            raise UserError(f"no input {name!r}: give user, time, targets/NAME and request/NAME")
    if "user" not in tensors:
        raise UserError("the input 'user' is missing")
    time = _one("time", tensors["time"]) if "time" in tensors else None
    return ScoreRequest(str(_one("user", tensors["user"])), targets, request, time)


def _one(name: str, values: Sequence[Any] | np.ndarray) -> Any:
    if len(values) != 1:
        raise UserError(f"{name!r} has {len(values)} values; give one")
    return values[0].item() if isinstance(values[0], np.generic) else values[0]
