"""Against Protocol Buffers' own parser."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorflow_datasets.proto import tf_example_pb2

from stca_jax.input.example import read_example

VALUES = st.one_of(
    st.binary(max_size=300), st.integers(-(2**63), 2**63 - 1), st.floats(width=32), st.none()
)


def example_of(values) -> tf_example_pb2.Example:
    example = tf_example_pb2.Example()
    for name, value in values.items():
        feature = example.features.feature[name]
        if isinstance(value, bytes):
            feature.bytes_list.value.append(value)
        elif isinstance(value, int):
            feature.int64_list.value.extend([value, 7])
        elif isinstance(value, float):
            feature.float_list.value.append(value)
    return example


@given(st.dictionaries(st.text(max_size=8), VALUES, min_size=1, max_size=5))
def test_reads_what_was_written(values):
    found = read_example(example_of(values).SerializeToString())
    assert found == {n: v for n, v in values.items() if isinstance(v, bytes | int)}


def test_matrices_are_views():
    data = example_of({"events": b"x" * 1_000}).SerializeToString()
    events = read_example(data)["events"]
    assert isinstance(events, memoryview)
    assert events.obj is data


@given(st.binary(max_size=300), st.data())
def test_a_part_is_refused(payload, draw):
    whole = example_of({"events": payload, "user_id": 5}).SerializeToString()
    part = whole[: draw.draw(st.integers(1, len(whole) - 1))]
    with pytest.raises(ValueError, match=r"tf\.Example"):
        read_example(part)
