"""The cache of records: what it keeps, within its bytes, and what it reads again."""

from in_memory_dataset import make_dataset

from stca_jax.input.record_cache import RecordCache, _num_bytes


def test_the_records_used_last_are_kept_within_the_bytes():
    dataset = make_dataset([(100, [50], [2])] * 4 + [(10_000, [50], [2])])
    reads = []

    def read(i):
        reads.append(i)
        return dataset.record(i)

    size = _num_bytes(dataset.record(0))
    cache = RecordCache(read, max_bytes=2 * size)
    for i in (0, 1, 0, 2, 0, 1, 4, 1, 4):  # 2 takes the place of 1, 1 that of 2; 4 is too large
        assert cache.record(i) is dataset.record(i)
    assert reads == [0, 1, 2, 1, 4, 4]
