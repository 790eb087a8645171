"""Files are there whole or as they were before; a bad place is one error before the work begins."""

import os
import signal
from pathlib import Path

import pytest
from signalled import running

from common.errors import UserError
from common.whole_files import check_place, link_whole, partial_of, target_of, write_whole


def content_of(folder):
    return {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}


def writes(text):
    return lambda file: file.write(text.encode())


def fails(file):
    file.write(b"half")
    raise OSError(28, "No space left on device")


def test_files_get_their_names_when_all_of_them_are_on_the_disk(tmp_path, monkeypatch):
    """Of the calls to the system, no rename comes before a file's fsync; the folder's is last."""
    calls = []
    for name in ("fsync", "replace"):
        of_system = getattr(os, name)

        def call(*args, name=name, of_system=of_system):
            calls.append(name)
            return of_system(*args)

        monkeypatch.setattr(os, name, call)
    write_whole([(tmp_path / "data", writes("weights")), (tmp_path / "model", writes("graph"))])
    assert content_of(tmp_path) == {"data": "weights", "model": "graph"}
    assert calls == ["fsync", "fsync", "replace", "replace", "fsync"]


@pytest.mark.parametrize("failing", [0, 1])
def test_if_one_file_fails_all_are_as_they_were(tmp_path, failing):
    names = ("data", "model")
    for name in names:
        (tmp_path / name).write_text("earlier")
    files = [(tmp_path / name, writes("new")) for name in names]
    files[failing] = (tmp_path / names[failing], fails)
    with pytest.raises(OSError, match="No space left on device"):
        write_whole(files)
    assert content_of(tmp_path) == {"data": "earlier", "model": "earlier"}


def test_a_second_name_of_a_file_replaces_another_file(tmp_path):
    """Also once it is there; what a killed run left at the temporary name is no hindrance."""
    (tmp_path / "data").write_text("values")
    (tmp_path / "name").symlink_to("data")
    (tmp_path / "model").write_text("earlier")
    partial_of(tmp_path / "model").write_text("half")
    for _ in range(2):
        assert link_whole(tmp_path / "name", tmp_path / "model")
        assert content_of(tmp_path) == {"data": "values", "model": "values", "name": "values"}
        assert os.path.samefile(tmp_path / "data", tmp_path / "model")
        assert not (tmp_path / "model").is_symlink()


def test_where_there_are_no_hard_links_all_is_as_it_was(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(18, "Invalid cross-device link")

    for name in ("data", "model"):
        (tmp_path / name).write_text(name)
    monkeypatch.setattr(os, "link", refuse)
    assert not link_whole(tmp_path / "data", tmp_path / "model")
    assert content_of(tmp_path) == {"data": "data", "model": "model"}


def test_an_interrupt_leaves_nothing_either(tmp_path):
    def interrupted(file):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole([(tmp_path / "model", interrupted)])
    assert os.listdir(tmp_path) == []


def test_places_that_can_be_written_are_taken(tmp_path):
    """A new file, an earlier one, what an interrupted run has left of one, and links to them."""
    earlier = tmp_path / "earlier"
    earlier.write_text("x")
    partial_of(earlier).write_text("half")
    for name, target in (("to earlier", "earlier"), ("to nothing yet", "new")):
        (tmp_path / name).symlink_to(target)
    for name in ("new", "earlier", "to earlier", "to nothing yet"):
        check_place(f"--flag={name}", tmp_path / name)
    assert target_of(tmp_path / "to nothing yet") == tmp_path / "new"


def folder(path):
    path.mkdir()


def pipe(path):
    os.mkfifo(path)


def link_to_itself(path):
    path.symlink_to(path.name)


def link_into_no_folder(path):
    path.symlink_to("no/file")


def folder_in_the_way(path):
    partial_of(path).mkdir()


MISTAKES = {
    "folder": (folder, "F is a folder: R"),
    "pipe": (pipe, "F is a device, pipe or socket, which a file cannot replace: R"),
    "link to itself": (link_to_itself, "F"),  # Pythons differ in what they say of it
    "link into no folder": (link_into_no_folder, "F: its folder does not exist: R"),
    "folder in the way": (folder_in_the_way, "m.partial is not a regular file: remove it or R"),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_bad_place_is_an_error_that_names_flag_and_remedy(tmp_path, kind):
    make, message = MISTAKES[kind]
    make(tmp_path / "m")
    before = os.listdir(tmp_path)
    with pytest.raises(UserError) as raised:
        check_place("F", tmp_path / "m", "R")
    text = str(raised.value)
    assert text.startswith("F") and message in text and text.endswith(" R")
    assert os.listdir(tmp_path) == before


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # as for root it never is
    with pytest.raises(UserError, match="^F: its folder is not writable: name another file$"):
        check_place("F", tmp_path / "m")


def test_what_the_system_refuses_to_look_at_is_an_error(tmp_path):
    """A name that has no room for .partial, and one that is too long itself."""
    for length in (255, 300):
        with pytest.raises(UserError, match="^F: File name too long: name another file$"):
            check_place("F", tmp_path / ("m" * length))
    check_place("F", tmp_path / ("m" * (255 - len(".partial"))))


def test_a_relative_path_is_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_place("F", Path("m"))
    write_whole([(target_of(Path("m")), writes("x"))])
    assert content_of(tmp_path) == {"m": "x"}


WRITING = """
from pathlib import Path
from common.whole_files import write_whole
def wait(_):
    with {hold}:
        say("ready")
        {wait}
os.fsync = wait
write_whole([(Path({path!r}), lambda file: file.write(b"new"))])
"""
WAITING = {
    "in Python": ("contextlib.nullcontext()", "time.sleep(60)"),
    "in C": ("termination.held_back()", "hang()"),
}


@pytest.mark.parametrize("where", WAITING)
def test_a_signal_leaves_the_file_that_was_there_and_no_partial_one(where, tmp_path):
    """Also if the disk hangs, so that the main thread does not come back to remove it."""
    path = tmp_path / "m.pth"
    path.write_text("old")
    hold, wait = WAITING[where]
    block = WRITING.format(hold=hold, wait=wait, path=str(path))
    with running(block, SECONDS_TO_UNWIND=0.2) as run:
        assert sorted(os.listdir(tmp_path)) == ["m.pth", "m.pth.partial"]
        assert run.end(signal.SIGTERM)[0] == 143
    assert os.listdir(tmp_path) == ["m.pth"] and path.read_text() == "old"


def test_a_second_name_that_a_killed_run_left_is_not_written_into(tmp_path):
    (tmp_path / "source").write_text("the data's own")
    os.link(tmp_path / "source", partial_of(tmp_path / "file"))
    write_whole([(tmp_path / "file", writes("new"))])
    assert content_of(tmp_path) == {"source": "the data's own", "file": "new"}
