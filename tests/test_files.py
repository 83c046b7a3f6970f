"""Files are complete or absent."""

import json
import os
import stat

import pytest
import yaml

from sparse_gen.files import atomic_write, claim_folder, write_json, write_yaml


def test_the_file_appears_only_when_it_is_complete(tmp_path):
    path = tmp_path / "a.bin"
    with atomic_write(path) as file:
        file.write(b"first")
        assert not path.exists()
    assert path.read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(error), atomic_write(path) as file:
        file.write(b"new")
        raise error
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_the_content_reaches_the_disk_before_the_name_does(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append(("fsync", os.fstat(fd).st_size)), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append(("replace", None)), replace(a, b)))
    with atomic_write(tmp_path / "a.bin") as file:
        file.write(b"12345")
    assert calls[:2] == [("fsync", 5), ("replace", None)]


def test_permissions_are_those_of_an_ordinary_new_file(tmp_path):
    (tmp_path / "ordinary").touch()
    with atomic_write(tmp_path / "ours"):
        pass
    ours, ordinary = (stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("ours", "ordinary"))
    assert ours == ordinary


def test_a_symbolic_link_stays_one(tmp_path):
    (tmp_path / "target").write_bytes(b"old")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with atomic_write(tmp_path / "link") as file:
        file.write(b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_bytes() == b"new"


def test_text_is_utf8_with_plain_line_ends(tmp_path):
    with atomic_write(tmp_path / "a.txt", "w") as file:
        file.write("σ\n")
    assert (tmp_path / "a.txt").read_bytes() == "σ\n".encode()


def test_other_modes_folders_and_missing_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match='expected "wb" or "w", got \'a\''), atomic_write(tmp_path / "a", "a"):
        pass
    with pytest.raises(IsADirectoryError, match="got the folder"), atomic_write(tmp_path):
        pass
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "none" / "a"):
        pass
    assert os.listdir(tmp_path) == []


def test_json_has_no_nan(tmp_path):
    write_json(tmp_path / "a.json", {"σ": 0.1, "psnr": None})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"psnr": float("nan")})
    assert json.loads((tmp_path / "a.json").read_text()) == {"σ": 0.1, "psnr": None}


def test_yaml_keeps_the_order_of_keys_below_its_heading(tmp_path):
    write_yaml(tmp_path / "a.yaml", {"z": 1, "a": [2, 3], "path": "ü: #x"}, heading="made by us")
    text = (tmp_path / "a.yaml").read_text()
    assert text.splitlines()[:3] == ["# made by us", "z: 1", "a: [2, 3]"]
    assert yaml.safe_load(text) == {"z": 1, "a": [2, 3], "path": "ü: #x"}


def test_claim_folder_makes_it_and_leaves_it_empty(tmp_path):
    folder = claim_folder(tmp_path / "a" / "b")
    assert os.listdir(folder) == []
    assert claim_folder(folder) == folder


def test_claim_folder_refuses_files_and_full_folders(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(FileExistsError, match="expected a folder, got the file"):
        claim_folder(tmp_path / "file", overwrite=True)
    with pytest.raises(FileExistsError, match="name another or add --overwrite"):
        claim_folder(tmp_path)
    with pytest.raises(OSError, match=r"expected a folder that can be written to, got .*\(Not a directory\)"):
        claim_folder(tmp_path / "file" / "inside")
    assert claim_folder(tmp_path, overwrite=True) == tmp_path
    assert os.listdir(tmp_path) == ["file"]
