from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import pathlib
import resource
import signal
import subprocess
import sys

import pytest
import small_dataset
from array_record.python import array_record_module
from small_dataset import USERS, USERS_PER_FILE, Builder

from stca_jax.data.preparation import make_builder
from stca_jax.schema import Schema


def build(data_dir: pathlib.Path) -> pathlib.Path:
    builder = Builder(data_dir=data_dir)
    builder.download_and_prepare()
    return pathlib.Path(builder.data_path)


def test_a_folder_called_data_where_one_works_is_not_taken_for_this_package(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    assert make_builder("synthetic_interests/tiny", tmp_path).info.description


def files(directory: pathlib.Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*.*")}


def test_builds_of_two_processes_are_byte_identical(tmp_path):
    script = "import sys; from small_dataset import Builder as B; B(data_dir=sys.argv[1])"
    script += ".download_and_prepare()"
    tests = pathlib.Path(small_dataset.__file__).parent
    subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "other")],
        env={"PYTHONPATH": f"{tests}:{tests.parent}", "HOME": str(tmp_path)},
        check=True,
    )
    assert files(build(tmp_path)) == files(tmp_path / "other" / "small" / "1.0.0")


def test_metadata_describe_the_files(tmp_path):
    directory = build(tmp_path)
    metadata = json.loads((directory / "metadata.json").read_text())
    schema = Schema.from_dict(metadata["schema"])
    assert (schema.history, schema.tasks) == (("item", "price"), ("click", "buy"))
    assert (metadata["validation_start"], metadata["test_start"]) == (800, 900)
    record_files = metadata["record_files"]
    assert sorted(record_files) == sorted(p.name for p in directory.glob("*array_record*"))
    assert [record_files[n]["records"] for n in sorted(record_files)] == list(USERS_PER_FILE)
    for name, described in record_files.items():
        data = (directory / name).read_bytes()
        assert described["bytes"] == len(data)
        assert described["sha256"] == hashlib.sha256(data).hexdigest()


def test_records_are_written_for_random_access(tmp_path):
    file = next(build(tmp_path).glob("*array_record*"))
    options = array_record_module.ArrayRecordReader(str(file)).writer_options_string()
    assert options.startswith("group_size:1,")
    assert "uncompressed" in options


def test_tensorflow_is_not_needed(tmp_path):
    build(tmp_path)
    assert "tensorflow" not in sys.modules


def test_an_invalid_record_stops_the_build_and_leaves_nothing(tmp_path, monkeypatch):
    late = dataclasses.replace(USERS[3], history_end=USERS[3].history_end + 1)
    monkeypatch.setattr(small_dataset, "USERS", [*USERS[:3], late, *USERS[4:]])
    with pytest.raises(ValueError, match="user 3: history_end"):
        build(tmp_path)
    assert not list(tmp_path.rglob("*array_record*"))
    assert not list(tmp_path.rglob("metadata.json"))


@pytest.mark.parametrize("method", ["write", "close"])
def test_a_full_disk_is_one_clear_error_and_leaves_nothing(tmp_path, monkeypatch, method):
    class FullDisk(array_record_module.ArrayRecordWriter):
        pass

    def fail(self, *_):
        raise RuntimeError("write() failed: No space left on device; writing x; at byte 4096")

    setattr(FullDisk, method, fail)
    monkeypatch.setattr(array_record_module, "ArrayRecordWriter", FullDisk)
    with pytest.raises(OSError, match="free some, or choose another data_dir") as caught:
        build(tmp_path)
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename.endswith("00000.array_record")
    assert not list(tmp_path.rglob("*array_record*"))
    monkeypatch.undo()
    build(tmp_path)


def test_a_failing_write_is_reported(tmp_path):
    """The operating system refuses for real: files may not grow beyond 4 kB."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4_096, limits[1]))
        with pytest.raises(OSError, match="File too large"):
            build(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(tmp_path.rglob("*array_record*"))
