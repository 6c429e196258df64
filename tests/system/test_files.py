"""Files are replaced whole, and nothing but a file is ever replaced."""

import os

import pytest

from engine.cli.keys import LocalPath
from engine.system.files import keep_as, path_argument, replacing


def test_what_is_no_regular_file_is_never_replaced(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "fifo")
    (tmp_path / "file").write_text("contents")
    there = sorted(tmp_path.iterdir())
    for name in ("fifo", "folder", "link"):
        with pytest.raises(OSError, match=f"no regular file, so it is not replaced: .*{name}"), replacing(tmp_path / name, "w"):
            pytest.fail("it began")
        with pytest.raises(OSError, match="no regular file"):
            keep_as(tmp_path / "file", tmp_path / name)
    assert sorted(tmp_path.iterdir()) == there
    assert (tmp_path / "fifo").is_fifo() and (tmp_path / "link").is_symlink()


def test_a_path_of_an_unknown_user_stays_as_it_is_written():
    assert (
        str(path_argument("~nobody-of-this-name/x")) == LocalPath().read("~nobody-of-this-name/x") == "~nobody-of-this-name/x"
    )
    assert str(path_argument("~/x")) == LocalPath().read("~/x") == os.path.expanduser("~/x")
