"""Checked files: read as they were written, and no damage goes unseen."""

import numpy as np
import pytest

from preparation.checked_file import CheckedFile, DamagedError, Writer, key_of

SECTIONS = (
    [np.arange(5, dtype=np.int32)],
    [],
    [b"abc", np.zeros((3, 2), np.uint8), b"", np.array([7], np.int64)],
    [b""],
    [bytes(range(64))],
)
CONTENTS = [b"".join(bytes(buffer) for buffer in section) for section in SECTIONS]
META = {"rows": 12345, "name": "schön", "runs": [[0, 3], [1, 4]]}
KEY, OTHER = key_of("what it is made from"), key_of("something else")


@pytest.fixture
def path(tmp_path):
    return write(tmp_path / "file", SECTIONS, META)


def write(path, sections, meta):
    with open(path, "wb") as file:
        writer = Writer(file)
        for section in sections:
            writer.section(section)
        writer.finish(KEY, meta)
    return path


def readings(path, key=KEY):
    """By name: (a way to read the file, what it returns if the file is whole)."""
    file = CheckedFile(path, key)
    found = {"meta": (file.meta, META)}
    sizes = [len(content) for content in CONTENTS]
    found["section_sizes"] = (lambda: file.section_sizes().tolist(), sizes)
    for number, content in enumerate(CONTENTS):
        found[f"section {number}"] = (lambda n=number: file.section(n), content)
    return found


def seen_through(path):
    """Names of the readings that return anything but what was written; DamagedError is right."""
    CheckedFile(path, KEY).exists()  # never raises
    wrong = []
    for name, (read, want) in readings(path).items():
        try:
            if read() != want:
                wrong.append(name)
        except DamagedError:
            pass
    return wrong


def assert_absent(path, key=KEY):
    assert not CheckedFile(path, key).exists()
    for read, _ in readings(path, key).values():
        with pytest.raises(DamagedError):
            read()


def test_a_file_is_read_as_it_was_written(path):
    """Sections of arrays and bytes, also empty ones, and the meta."""
    assert CheckedFile(path, KEY).exists()
    for name, (read, want) in readings(path).items():
        assert read() == want, name
    with pytest.raises(DamagedError):
        CheckedFile(path, KEY).section(len(CONTENTS))


def test_a_file_without_sections_has_its_meta(tmp_path):
    file = CheckedFile(write(tmp_path / "file", [], {}), KEY)
    assert file.exists() and file.meta() == {} and file.section_sizes().tolist() == []


def test_a_missing_file_and_one_of_another_key_are_absent(path, tmp_path):
    assert_absent(tmp_path / "none")
    assert_absent(path, OTHER)


def test_keys_differ_if_facts_do():
    facts = ["a", 1, None, [1, 2], {"n": 1.5}]
    assert key_of(*facts) == key_of(*facts)
    assert len({key_of(*facts), key_of(*facts[:4]), key_of("ab"), key_of("a", "b"), key_of()}) == 5


def test_no_flipped_byte_returns_wrong_bytes(path):
    """In sections, meta, index and trailer; what the byte has no part in may still be read."""
    whole = path.read_bytes()
    for offset in range(len(whole)):
        for mask in (0x01, 0x80, 0xFF):
            damaged = bytearray(whole)
            damaged[offset] ^= mask
            path.write_bytes(damaged)
            assert not seen_through(path), f"byte {offset} of {len(whole)} ^ {mask:#x}"


def test_each_reading_checks_its_own_bytes(path):
    """A flipped byte of a section, and of the meta, is found by whoever reads it."""
    whole = path.read_bytes()
    offsets = {"meta": whole.index(b'{"rows"')}
    offsets |= {f"section {k}": whole.index(CONTENTS[k]) for k in (0, 2, 4)}
    for name, offset in offsets.items():
        damaged = bytearray(whole)
        damaged[offset + 2] ^= 0x10
        path.write_bytes(damaged)
        with pytest.raises(DamagedError):
            readings(path)[name][0]()


def test_a_truncated_or_longer_file_is_absent(path):
    """Cut at any byte, or with more behind its end."""
    whole = path.read_bytes()
    cuts = [whole[:size] for size in range(len(whole))]
    for content in (*cuts, whole + b"\0", whole + whole[-10:], bytes(len(whole))):
        path.write_bytes(content)
        assert_absent(path)


def test_zeros_at_the_end_are_found(path):
    """After a crash, blocks of a file may never have reached the disk."""
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size] + bytes(len(whole) - size))
        assert not seen_through(path)
