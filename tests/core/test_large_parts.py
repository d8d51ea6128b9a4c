"""Files in large parts."""

import io

import pytest

from portlm.large_parts import PART, in_large_parts


class Recorder(io.BytesIO):
    """A file that notes where each call wrote how much."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[int, int]] = []

    def write(self, data) -> int:
        self.calls.append((self.tell(), len(data)))
        return super().write(data)


@pytest.mark.parametrize(
    "sizes",
    [[], [0, 1], [PART], [PART - 1, 1], [5, PART, 7], [100, 3 * PART + 1], [3, 2 * PART - 3, PART, 11]],
)
def test_all_bytes_arrive_in_parts_that_begin_at_multiples_of_one(sizes):
    file, expected = Recorder(), bytearray()
    with in_large_parts(file) as parts:
        for i, size in enumerate(sizes):
            piece = bytes([i + 1]) * size
            expected += piece
            parts.write(memoryview(piece))
    assert file.getvalue() == expected
    written = [(at, size) for at, size in file.calls if size]
    assert all(at % PART == 0 for at, _ in written)
    assert all(size == PART for _, size in written[:-1])
