"""Files appear complete, with usual permissions, also through links; folders are replaced so that nothing is mixed."""

import contextlib
import errno
import itertools
import os
import stat
import tempfile
from pathlib import Path

import peft
import pytest
import torch
from damage import one_line
from edits import EDITS, edited_model
from safetensors import SafetensorError
from safetensors.torch import save_file

from peft_edit import files, merge_checkpoint
from peft_edit.adapters.save import save_adapter
from peft_edit.cli import main


def usual(path):
    """Whether a file has the permissions of one that was simply opened."""
    other = path.with_name("other")
    other.touch()
    same = stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(other.stat().st_mode)
    other.unlink()
    return same


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_permissions_are_those_of_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        with files.written(tmp_path / "a.safetensors") as temporary:
            save_file({"a": torch.zeros(2)}, temporary)
        save_file({"a": torch.zeros(2)}, tmp_path / "b.safetensors")
        files.give_usual_permissions(tmp_path / "b.safetensors")
        with files.replaced(tmp_path, last="c") as work:
            save_file({"a": torch.zeros(2)}, work / "c")
        assert all(usual(tmp_path / name) for name in ("a.safetensors", "b.safetensors", "c"))
    finally:
        os.umask(before)


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    file = tmp_path / "file"
    files.write_text(file, "old")
    with pytest.raises(ZeroDivisionError), files.written(file) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and file.read_text() == "old"
    with files.written(file) as one, files.written(file) as other:  # two writers do not mix
        one.write_text("one")
        other.write_text("other")
    assert file.read_text() == "one" and usual(file) and [path.name for path in tmp_path.iterdir()] == ["file"]
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="folder is no file that can be replaced: choose another path"):
        files.write_text(tmp_path / "folder", "new")


def test_a_link_stays_and_its_target_is_replaced_in_its_own_folder(tmp_path, monkeypatch):
    """A rename from the link's folder would fail where the target is on another filesystem."""
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "target").write_text("old")
    (tmp_path / "link").symlink_to("far/target")
    replaced, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (replaced.append((a.parent, b.parent)), replace(a, b)))
    files.write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "far" / "target").read_text() == "new"
    assert replaced == [((tmp_path / "far").resolve(),) * 2]

    (tmp_path / "folder").symlink_to("far")
    with files.replaced(tmp_path / "folder", last="config") as work:
        (work / "config").write_text("config")
        (work / "folder").mkdir()
        (work / "folder" / "config").write_text("inner")
        assert work.resolve().parent == (tmp_path / "far").resolve()
    assert (tmp_path / "far" / "folder" / "config").read_text() == "inner"
    assert (tmp_path / "far" / "config").read_text() == "config" and (tmp_path / "folder").is_symlink()


def test_files_of_a_folder_may_be_links_to_another_filesystem(tmp_path):
    with tempfile.TemporaryDirectory(dir="/dev/shm") as far:
        for name in ("weights", "config"):
            Path(far, name).write_text("old")
            (tmp_path / name).symlink_to(Path(far, name))
        with files.replaced(tmp_path, last="config") as work:
            for name in ("weights", "config"):
                (work / name).write_text("new")
        assert all((tmp_path / name).is_symlink() for name in ("weights", "config"))
        assert {file.name: file.read_text() for file in Path(far).iterdir()} == {"weights": "new", "config": "new"}


def old_folder(path):
    for name in ("weights", "config"):
        (path / name).write_text("old")
    (path / "mine").write_text("mine")


def replace_until(path, count, stop):
    """Replace a folder's files, and stop before the change of a name, or wait for the disk, of this number."""
    calls = itertools.count()
    with pytest.MonkeyPatch.context() as patch, files.replaced(path, last="config") as work:
        for name in ("weights", "config"):
            (work / name).write_text("new")
        for holder, name in ((os, "replace"), (os, "fsync"), (os, "rename"), (Path, "unlink")):
            function = getattr(holder, name)

            def or_stop(*args, function=function, **kwargs):
                return stop() if next(calls) == count else function(*args, **kwargs)

            patch.setattr(holder, name, or_stop)


def interrupt(*args, **kwargs):
    raise KeyboardInterrupt


@pytest.mark.parametrize("killed_at", range(16))
def test_a_killed_save_mixes_nothing(tmp_path, killed_at):
    """There are the old files, or the new ones, or files without a configuration."""
    old_folder(tmp_path)
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            replace_until(tmp_path, killed_at, lambda: os._exit(1))
        os._exit(0)
    os.waitpid(child, 0)
    found = {path.name: path.read_text() for path in tmp_path.iterdir() if path.is_file() and path.name[0] != "."}
    assert found.pop("mine") == "mine"
    assert "config" not in found or found == dict.fromkeys(("config", "weights"), found["config"])
    with files.replaced(tmp_path, last="config") as work:
        assert list(work.iterdir()) == []
        (work / "config").write_text("again")
    assert (tmp_path / "config").read_text() == "again" and not (tmp_path / files.NEW).exists()


@pytest.mark.parametrize("interrupted_at", range(14))
def test_an_interrupt_leaves_the_old_files_or_the_new_ones(tmp_path, interrupted_at):
    old_folder(tmp_path)
    with contextlib.suppress(KeyboardInterrupt):
        replace_until(tmp_path, interrupted_at, interrupt)
    found = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert found.pop("mine") == "mine" and len(set(found.values())) == 1 and set(found) == {"weights", "config"}


def test_a_folder_in_the_place_of_a_file_is_said_before_anything_moves(tmp_path):
    (tmp_path / "config").write_text("old")
    (tmp_path / "weights").mkdir()
    with pytest.raises(ValueError, match="weights is a folder"), files.replaced(tmp_path, last="config") as work:
        for name in ("weights", "config"):
            (work / name).write_text("new")
    assert (tmp_path / "config").read_text() == "old"


@pytest.mark.parametrize("edit", EDITS)
def test_an_adapter_is_saved_by_peft_whole_or_not_at_all(edit, tmp_path, monkeypatch):
    """PEFT writes the weights first, and the configuration after them."""
    model = edited_model(edit)
    model.save_pretrained(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(type(model.peft_config["default"]), "save_pretrained", interrupt)
        edited_model(edit, seed=1).save_pretrained(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    for others in ({"is_main_process": False}, {"save_directory": tmp_path / "none", "is_main_process": False}):
        edited_model(edit, seed=1).save_pretrained(**{"save_directory": tmp_path, **others})
    edited_model(edit, seed=1).save_pretrained(tmp_path, True, None, "auto", False)  # not the main process either
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()} == before
    (tmp_path / "README.md").write_text("mine")
    model.add_adapter("other", EDITS[edit]())
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine" and (tmp_path / "other" / "README.md").exists()
    assert {file.name for file in tmp_path.iterdir()} - {"none"} == {*before, "other"}


def test_what_a_killed_save_has_left_is_saved_over(tmp_path):
    model = edited_model(next(iter(EDITS)))
    save_adapter(model, tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    save_adapter(model, tmp_path)
    assert (tmp_path / "adapter_config.json").exists()


def test_files_that_others_hold_and_errors_are_left_alone(tmp_path):
    with pytest.raises(ZeroDivisionError), files.replaced(tmp_path / "a", last="config") as work:
        (work / "config").write_text("half")
        raise ZeroDivisionError
    assert not (tmp_path / "a").exists()
    with (
        files.replaced(tmp_path / "a", last="config"),
        pytest.raises(ValueError, match=r"^another run is writing .*a: wait for it"),
        files.replaced(tmp_path / "a", last="config"),
    ):
        pass
    with files.locked(tmp_path, "busy"):
        inode = (tmp_path / files.LOCK).stat().st_ino
        with pytest.raises(ValueError, match=r"^busy$"), files.locked(tmp_path, "busy"):
            pass
    assert (tmp_path / files.LOCK).stat().st_ino == inode, "two runs would have a lock each"


def test_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"file/a cannot be written to \(Not a directory\)"):  # noqa: SIM117
        with files.locked(tmp_path / "file" / "a", "busy"):
            pass


def test_links_that_lead_back_to_themselves_are_one_line(tmp_path, monkeypatch, capsys):
    loop = tmp_path / "loop"
    loop.symlink_to("loop")
    edit = edited_model(next(iter(EDITS)))
    with contextlib.ExitStack() as stack:
        for call in (
            lambda: files.write_text(loop, "x"),
            lambda: files.write_text(loop / "x", "x"),
            lambda: stack.enter_context(files.replaced(loop, last="x")),
            lambda: stack.enter_context(files.growing_folder(loop, {})),
            lambda: files.check_writable(loop),
            lambda: save_adapter(edit, loop),
            lambda: edit.save_pretrained(loop),
            lambda: merge_checkpoint(tmp_path, tmp_path, loop),
        ):
            with pytest.raises(ValueError, match=r"loop.* is a loop of symbolic links: choose another path") as error:
                call()
            assert one_line(error.value)
    for command in (["convert", "m", loop, loop], ["inspect", loop, "--json", loop], ["fit-sea", "m", "store", loop]):
        monkeypatch.setattr("sys.argv", ["peft-edit", *map(str, command)])
        with pytest.raises(SystemExit) as stopped:
            main()
        err = capsys.readouterr().err
        assert stopped.value.code == 2 and str(loop) in err and err.count("\n") == 1, err


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def full_disk_of_safetensors(*args, **kwargs):
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("fail", [full_disk, full_disk_of_safetensors])
def test_a_full_disk_names_the_path(tmp_path, monkeypatch, capsys, fail):
    def written():
        with files.written(tmp_path / "a"):
            fail()

    def replaced():
        with files.replaced(tmp_path / "a", last="x"):
            fail()

    def grown():
        with files.growing_folder(tmp_path / "a", {}):
            fail()

    monkeypatch.setattr(peft.peft_model, "safe_save_file", fail)
    edit = edited_model(next(iter(EDITS)))
    for call in (
        written,
        replaced,
        grown,
        lambda: save_adapter(edit, tmp_path / "a"),
        lambda: edit.save_pretrained(tmp_path / "a"),
    ):
        with pytest.raises(OSError, match="No space left on device") as error:
            call()
        assert error.value.errno == errno.ENOSPC and error.value.filename == str(tmp_path / "a")
        assert not (tmp_path / "a").exists()
    monkeypatch.setattr("peft_edit.cli.application", lambda: lambda *args, **kwargs: save_adapter(edit, tmp_path / "a"))
    with pytest.raises(SystemExit):
        main()
    line = f"peft-edit: {tmp_path / 'a'}: No space left on device; free some space, then run the same again\n"
    assert capsys.readouterr().err == line


def test_other_errors_of_the_disk_stay_as_they_are(tmp_path):
    with pytest.raises(PermissionError) as error, files.naming_full_disk(tmp_path):
        raise PermissionError(errno.EACCES, "Permission denied", "elsewhere")
    assert error.value.filename == "elsewhere"


def test_lines_are_whole_or_not_there(tmp_path):
    file = tmp_path / "lines"
    assert files.whole_lines(file) == []
    files.append_line(file, "one")
    file.write_bytes(file.read_bytes() + "two, cut öff".encode()[:-3])
    assert files.whole_lines(file) == ["one"]
    files.append_line(file, "zwö")
    assert file.read_text("utf-8") == "one\nzwö\n" and files.whole_lines(file) == ["one", "zwö"]


@pytest.mark.parametrize("block", [1, 3, 64])
def test_a_line_that_was_cut_off_goes_however_long_the_others_are(block, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "BLOCK", block)
    path = tmp_path / "lines"
    for held, whole in ((b"", b""), (b"cut", b""), (b"one\n", b"one\n"), (b"one\ntwo\ncut off", b"one\ntwo\n")):
        path.write_bytes(held)
        files.append_line(path, "three\nfour")
        assert path.read_bytes() == whole + b"three\nfour\n"
        assert files.whole_lines(path) == [*whole.decode().split("\n")[:-1], "three", "four"]
