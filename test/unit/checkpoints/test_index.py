"""index.json is what was written, or an error that says what is wrong with it."""

import json
import re

import pytest
from written import MATRICES, ends_soon, rewrite_index

from checkpoints.index import FORMAT, INDEX, Index, NewerFormatError, ShardFile
from checkpoints.matrices import MatrixShape, Shard
from checkpoints.shard_file import DamagedError, FileFacts

FILES = (
    ShardFile("a.safetensors", FileFacts(300, 2**32 - 1), (Shard("emb_l.0.weight", 0, 2),)),
    ShardFile(
        "rank-001-0000.safetensors",
        FileFacts(44, 0),
        (Shard("top_l.0.bias", 0, 2), Shard("emb_l.0.weight", 2, 5)),
    ),
)
INDEX_OF_ALL = Index(
    flags={"mlp": [13, 16], "loss_threshold": 0.1, "seed": 1, "text": "ä\ud800", "no": None},
    data={"rows of each part": [1, 2]},
    matrices=MATRICES,
    files=FILES,
    state={"progress": {"iter": 7, "best": None, "tiny": 5e-324}, "list": [True, []]},
)  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    (tmp_path / INDEX).write_text(INDEX_OF_ALL.to_text())
    return tmp_path


def assert_damaged(folder, match):
    with pytest.raises(DamagedError, match=match) as error:
        Index.read(folder)
    assert str(error.value).startswith(str(folder / INDEX))


def test_an_index_comes_back(folder):
    assert Index.read(folder) == INDEX_OF_ALL
    assert INDEX_OF_ALL.num_bytes == 344


def test_its_checksum_is_that_of_the_content_however_it_is_laid_out(folder):
    whole = json.loads((folder / INDEX).read_text())
    turned = {key: whole[key] for key in sorted(whole, reverse=True)}
    (folder / INDEX).write_text(json.dumps(turned, indent=7))
    assert Index.read(folder) == INDEX_OF_ALL
    rewrite_index(folder, lambda content: None)  # which computes it by itself
    assert Index.read(folder) == INDEX_OF_ALL


def test_a_flipped_bit_of_any_byte_is_found(folder):
    """Or it changes nothing, as one between two values may."""
    text = (folder / INDEX).read_bytes()
    num_found = 0
    for place in range(len(text)):
        changed = bytearray(text)
        changed[place] ^= 1 << (3 * place % 8)
        (folder / INDEX).write_bytes(changed)
        try:
            assert Index.read(folder) == INDEX_OF_ALL
        except (DamagedError, NewerFormatError):
            num_found += 1
    assert num_found > 0.9 * len(text)


def test_every_cut_is_found(folder):
    text = (folder / INDEX).read_bytes()
    for size in (*range(0, len(text), 7), len(text) - 1):
        (folder / INDEX).write_bytes(text[:size])
        assert_damaged(folder, "is damaged")


def test_a_changed_value_is_found_by_the_checksum(folder):
    rewrite_index(folder, lambda content: content["flags"].update(seed=2), False)
    assert_damaged(folder, "its checksum is another one")


def test_no_index_is_an_error(tmp_path):
    assert_damaged(tmp_path, "No such file")
    (tmp_path / INDEX).mkdir()
    assert_damaged(tmp_path, "is no regular file")
    (tmp_path / INDEX).rmdir()
    (tmp_path / INDEX).symlink_to("/dev/zero")
    with ends_soon():
        assert_damaged(tmp_path, "is no regular file")


def test_an_index_without_end_is_not_read(tmp_path):
    with open(tmp_path / INDEX, "wb") as file:
        file.truncate(1 << 40)
    with ends_soon():
        assert_damaged(tmp_path, "has 1099511627776 bytes")


def test_a_newer_format_is_no_damage(folder):
    """Whatever it holds: only its number has to be where it is today."""
    for whole in ({"format": FORMAT + 1}, {"format": 99, "content": [], "crc32": "another"}):
        (folder / INDEX).write_text(json.dumps(whole))
        known = f"has format {whole['format']}, this program knows {FORMAT}: continue with"
        with pytest.raises(NewerFormatError, match=known):
            Index.read(folder)


@pytest.mark.parametrize("number", [0, -1, 10**400, 1.0, True, "1", None, [1]])
def test_a_format_that_cannot_be_is_damage(folder, number):
    whole = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps(whole | {"format": number}))
    assert_damaged(folder, "is damaged")


@pytest.mark.parametrize(
    "text",
    [
        b"", b"[]", b"null", b"\xff\xfe", b"\x80\x02}.", b"[" * 100_000, b'{"a":' * 100_000,
        b'{"format": 1, "crc32": 0, "content": ' + b"[" * 500 + b"]" * 500 + b"}",
        b'{"format": 1, "crc32": 0, "content": {"flags": NaN}}',
        b'{"format": 1, "crc32": 0, "content": {"flags": 1e999}}',
        b'{"format": 1, "crc32": 0, "content": {"flags": ' + b"9" * 5000 + b"}}",
    ],
)  # fmt: skip
def test_what_is_no_index_is_damage(tmp_path, text):
    (tmp_path / INDEX).write_bytes(text)
    with ends_soon():
        assert_damaged(tmp_path, "is damaged")


def test_numbers_that_json_does_not_have_are_not_written():
    index = Index({"rate": float("nan")}, {}, {}, (), {})
    with pytest.raises(ValueError, match="not JSON compliant"):
        index.to_text()


@pytest.mark.parametrize(
    "name",
    [
        "", "a", "../a.safetensors", "/etc/a.safetensors", "a/b.safetensors", ".a.safetensors",
        "a.safetensors\n", "a\0.safetensors", "a.safetensors.pkl", "..", "-x.bin", "ä.safetensors",
    ],
)  # fmt: skip
def test_a_file_of_another_folder_is_not_named(folder, name):
    rewrite_index(folder, lambda content: content["files"][0].update(name=name))
    assert_damaged(folder, "is damaged .name is .*, expected that of a .safetensors file")


def shards_of(*shards):
    return [{"name": "a.safetensors", "bytes": 8, "crc32": 0, "shards": list(shards)}]


EMB, BIAS = "emb_l.0.weight", ["top_l.0.bias", 0, 2]
WRONG_ROWS = {
    "none": ((BIAS,), "emb_l.0.weight has 5 rows, the files have 0"),
    "last missing": (([EMB, 0, 4], BIAS), "emb_l.0.weight has 5 rows, the files have 4"),
    "first missing": (([EMB, 1, 5], BIAS), "row 0 of emb_l.0.weight is in no file, or in two"),
    "gap": (([EMB, 3, 5], [EMB, 0, 2], BIAS), "row 2 of emb_l.0.weight is in no file"),
    "twice": (([EMB, 0, 3], [EMB, 2, 5], BIAS), "row 3 of emb_l.0.weight is in no file"),
    "whole twice": (([EMB, 0, 5], [EMB, 0, 5], BIAS), "row 5 of emb_l.0.weight is in no file"),
    "too many": (([EMB, 0, 6], BIAS), "emb_l.0.weight has 5 rows, the files have 6"),
    "unknown": (([EMB, 0, 5], BIAS, ["a\x1b[2J", 0, 1]), r"rows of 'a\\x1b\[2J', an unknown"),
    "backwards": (([EMB, 5, 0], BIAS), r"end is 0, expected a whole number in \[5"),
    "two numbers": (([EMB, 0], BIAS), "a shard is a list"),
    "no list": ((EMB, BIAS), "a shard is 'emb_l.0.weight'"),
    "huge": (([EMB, 0, 10**400], BIAS), "end is a number of 1329 bits"),
}


@pytest.mark.parametrize("name", WRONG_ROWS)
def test_rows_are_in_one_file_each(folder, name):
    shards, told = WRONG_ROWS[name]
    rewrite_index(folder, lambda content: content.update(files=shards_of(*shards)))
    assert_damaged(folder, told)


def test_a_matrix_whose_name_a_terminal_would_obey_is_told_in_a_readable_line(folder):
    name, shape = "a\x1b[2J", {"rows": 1, "row_shapes": {"weight": [3]}}
    for shards in ([], [[name, 1, 1]], [[name, 0, 2]]):

        def change(content, shards=shards):
            content["matrices"] = {name: shape}
            content["files"] = shards_of(*shards)

        rewrite_index(folder, change)
        assert_damaged(folder, r"'a\\x1b\[2J'")


def test_a_matrix_without_its_parameter_is_damage(folder):
    rewrite_index(folder, lambda content: content["matrices"][EMB]["row_shapes"].pop("weight"))
    assert_damaged(folder, "row_shapes has no weight")


def test_rows_may_be_cut_anywhere_and_be_in_any_order(folder):
    shards = ([EMB, 4, 5], [EMB, 2, 4], [EMB, 2, 2], BIAS, [EMB, 0, 2])
    rewrite_index(folder, lambda content: content.update(files=shards_of(*shards)))
    assert [shard.begin for shard in Index.read(folder).files[0].shards] == [4, 2, 2, 0, 0]


def test_a_matrix_without_rows_needs_no_file(tmp_path):
    index = Index({}, {}, {"a": MatrixShape(0, {"weight": (4,)})}, (), {})
    (tmp_path / INDEX).write_text(index.to_text())
    assert Index.read(tmp_path) == index


def places_in(value, path=()):
    """The place of each value in JSON: the keys and numbers that lead there."""
    if path:
        yield path
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places_in(inner, (*path, key))


def put(content, path, value):
    *way, last = path
    for key in way:
        content = content[key]
    if value is DELETED:
        del content[last]
    else:
        content[last] = value


DELETED = "deleted"
CONTENT = json.loads(INDEX_OF_ALL.to_text())["content"]
WRONG = [DELETED, None, True, -1, 1.5, 10**400, "a\x1b[2J", [], {}, [[]], {"a": [None]}]
FREE = ("flags", "data", "state")  # what is in them, others check


@pytest.mark.parametrize(
    "path", list(places_in(CONTENT)), ids=lambda path: ".".join(map(str, path))
)
def test_a_wrong_value_at_any_place_is_damage(folder, path):
    """Although its checksum is right: whoever made it, nothing but what is expected comes in."""
    is_free = path[0] in FREE and len(path) > 1
    is_shape = path[0] == "matrices" and "row_shapes" in path  # which is compared with the model's
    for value in WRONG:
        (folder / INDEX).write_text(INDEX_OF_ALL.to_text())
        rewrite_index(folder, lambda content, value=value: put(content, path, value))
        try:
            found = Index.read(folder)
        except DamagedError as error:
            assert re.search("is damaged", str(error)) and str(error).isprintable()
            continue
        same_kind = isinstance(value, dict) and path[0] in FREE and len(path) == 1
        assert is_free or is_shape or same_kind, value
        assert isinstance(found.flags, dict) and isinstance(found.state, dict)
