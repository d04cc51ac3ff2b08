"""Files appear complete, with usual permissions, also through links; folders are replaced so that nothing is mixed."""

import os
import stat
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import save_file

from peft_edit import files


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
    files.hidden(file).write_text("of a killed run")
    files.hidden(file).chmod(0o600)
    files.write_text(file, "new")
    assert file.read_text() == "new" and usual(file)


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
        assert work.resolve().parent == (tmp_path / "far").resolve()
    assert (tmp_path / "far" / "config").read_text() == "config" and (tmp_path / "folder").is_symlink()


@pytest.mark.parametrize("killed_at", range(8))
def test_an_interrupted_save_mixes_nothing(tmp_path, killed_at):
    """Killed before each change of a name: old files, new files, or files without a configuration."""
    (tmp_path / "weights").write_text("old")
    (tmp_path / "config").write_text("old")
    (tmp_path / "mine").write_text("mine")
    script = f"""
        import os
        from pathlib import Path
        from peft_edit import files

        calls = 0

        def kill_or(function):
            def call(*args, **kwargs):
                global calls
                if calls == {killed_at}:
                    os._exit(1)
                calls += 1
                return function(*args, **kwargs)
            return call

        with files.replaced(Path({str(tmp_path)!r}), last="config") as work:
            (work / "config").write_text("new")
            (work / "weights").write_text("new")
            os.replace, os.unlink, os.fsync = map(kill_or, (os.replace, os.unlink, os.fsync))
            Path.unlink = kill_or(Path.unlink)
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], env=environment, check=False)
    found = {path.name: path.read_text() for path in tmp_path.iterdir() if path.is_file() and path.name[0] != "."}
    assert found.pop("mine") == "mine"
    assert "config" not in found or found == dict.fromkeys(("config", "weights"), found["config"])
    with files.replaced(tmp_path, last="config") as work:
        assert list(work.iterdir()) == []
        (work / "config").write_text("again")
    assert (tmp_path / "config").read_text() == "again" and not (tmp_path / ".new").exists()


def test_files_that_others_hold_and_errors_are_left_alone(tmp_path):
    with pytest.raises(ZeroDivisionError), files.replaced(tmp_path / "a", last="config") as work:
        (work / "config").write_text("half")
        raise ZeroDivisionError
    assert [path.name for path in (tmp_path / "a").iterdir()] == [files.LOCK]
    with files.locked(tmp_path / "a", "busy"):
        inode = (tmp_path / "a" / files.LOCK).stat().st_ino
        with pytest.raises(ValueError, match=r"^another run is writing .*a: wait for it"):  # noqa: SIM117
            with files.replaced(tmp_path / "a", last="config"):
                pass
    assert (tmp_path / "a" / files.LOCK).stat().st_ino == inode, "two runs would have a lock each"


def test_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"file/a cannot be written to \(Not a directory\)"):  # noqa: SIM117
        with files.locked(tmp_path / "file" / "a", "busy"):
            pass
