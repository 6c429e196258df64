"""A damaged archive gives the right bytes or a refusal, never less; a compressed one is proved whole by its checksum."""

import bz2
import collections
import gzip
import io
import lzma
import tarfile

import numpy as np
import pytest
from conftest import encoded, photo
from published_forms import WNIDS, add_to_tar, official, prepare

from engine.data.images import decode_rgb
from engine.preparation import forms
from engine.preparation.archives import tar_listing
from engine.preparation.packed import PackedSplit
from engine.system.errors import DataError


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    """The official files in small, of 3 classes with 5 images each and 6 for validation; PNGs, which have checksums."""

    def image(seed):
        return encoded(photo(20, 24, seed=seed), "PNG")

    train = {wnid: {f"{wnid}_{n}.JPEG": image(n + 5 * c) for n in range(5)} for c, wnid in enumerate(WNIDS)}
    val = {wnid: {} for wnid in WNIDS}
    for number, wnid in enumerate([*reversed(WNIDS), *WNIDS], start=1):
        val[wnid][f"ILSVRC2012_val_{number:08d}.JPEG"] = image(100 + number)
    return official(tmp_path_factory.mktemp("tars"), {"train": train, "val": val})


def everything(folder):
    """[(split, class, name, bytes)] of a data set; an image that does not decode is refused, as in preparation."""
    source = forms.open_source(folder)
    images = [
        (split, source.classes[entry.label], entry.name, entry.place.read())
        for split, entries in source.splits.items()
        for entry in entries
    ]
    for *_, content in images:
        decode_rgb(content)
    return images, source.remarks


def damaged_copy(original, folder, name, content):
    folder.mkdir()
    for path in original.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / name).unlink()
    (folder / name).write_bytes(content)
    return folder


def test_100_damaged_variants_of_the_official_tars_give_the_right_bytes_or_a_refusal(tars, tmp_path):
    whole, remarks = everything(tars)
    assert (len(whole), remarks) == (21, [])
    rng = np.random.default_rng(0)
    outcomes = collections.Counter()
    for number in range(100):
        name = (forms.TRAIN_TAR, forms.VAL_TAR, forms.TRAIN_TAR, forms.DEVKIT)[number % 4]
        content = bytearray((tars / name).read_bytes())
        kind = "cut" if number % 3 == 0 else "flipped bit"
        if kind == "cut":
            content = content[: rng.integers(len(content))]
        else:
            content[rng.integers(len(content))] ^= 1 << rng.integers(8)
        try:
            same = everything(damaged_copy(tars, tmp_path / str(number), name, content)) == (whole, [])
            outcomes[kind, "right" if same else "WRONG"] += 1
        except (DataError, ValueError, OSError, SyntaxError):  # the last ones are Pillow's, of an image
            outcomes[kind, "refused"] += 1
    print(dict(outcomes))
    assert sum(outcomes.values()) == 100
    assert outcomes["cut", "WRONG"] == outcomes["flipped bit", "WRONG"] == 0
    assert outcomes["cut", "refused"] >= 25
    assert outcomes["flipped bit", "refused"] >= 10


def headers_of(path):
    """[(byte of a member's header, its name, size)]"""
    with tarfile.open(path) as archive:
        return [(member.offset, member.name, member.size) for member in archive]


def test_a_tar_cut_where_a_member_begins_is_refused_with_the_byte(tars, tmp_path):
    for name in (forms.TRAIN_TAR, forms.VAL_TAR):
        content = (tars / name).read_bytes()
        for offset, _, _ in headers_of(tars / name):
            folder = damaged_copy(tars, tmp_path / f"{name} {offset}", name, content[:offset])
            with pytest.raises(DataError, match=r"empty file|is cut off: it has no end at byte "):
                forms.open_source(folder)


def test_a_damaged_header_is_refused_with_its_byte_in_outer_and_inner_tars(tars, tmp_path):
    content = (tars / forms.TRAIN_TAR).read_bytes()
    outer = headers_of(tars / forms.TRAIN_TAR)
    inner_start = outer[1][0] + 512
    (tmp_path / "inner.tar").write_bytes(content[inner_start : inner_start + outer[1][2]])
    inner = [(inner_start + offset, name, size) for offset, name, size in headers_of(tmp_path / "inner.tar")]
    for number, (offset, _, _) in enumerate([*outer[1:], *inner[1:]]):
        for byte in (offset + 3, offset + 130, offset + 150):  # of its name, its size, its checksum
            damaged = bytearray(content)
            damaged[byte] ^= 4
            folder = damaged_copy(tars, tmp_path / f"{number} {byte}", forms.TRAIN_TAR, damaged)
            with pytest.raises(DataError, match=f"no whole header of a file at byte {offset:,}"):
                forms.open_source(folder)


def test_something_behind_the_end_of_a_tar_is_refused(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        add_to_tar(archive, "train/cat/1.jpg", b"1")
    content = (tmp_path / "a.tar").read_bytes()
    assert list(tar_listing(tmp_path / "a.tar").files) == ["train/cat/1.jpg"]
    (tmp_path / "a.tar").write_bytes(content + content)
    with pytest.raises(DataError, match=f"something at byte {len(content):,}"):
        tar_listing(tmp_path / "a.tar")
    (tmp_path / "a.tar").write_bytes(content[:1024] + bytes(512) + content[:1024])  # a block of zeros in the middle
    with pytest.raises(DataError, match="no whole header of a file at byte 1,536"):
        tar_listing(tmp_path / "a.tar")
    for zeros, whole in ((0, False), (512, False), (1024, True), (1025, True)):
        (tmp_path / "a.tar").write_bytes(content[:1024] + bytes(zeros))
        if whole:
            tar_listing(tmp_path / "a.tar")
        else:
            with pytest.raises(DataError, match="is cut off: it has no end at byte 1,024"):
                tar_listing(tmp_path / "a.tar")


def test_what_the_kit_promises_must_be_there(tars, tmp_path):
    def without(tar, unwanted):
        buffer = io.BytesIO()
        with tarfile.open(tars / tar) as old, tarfile.open(fileobj=buffer, mode="w") as new:
            for member in old:
                if member.name != unwanted:
                    new.addfile(member, old.extractfile(member))
        return damaged_copy(tars, tmp_path / tar, tar, buffer.getvalue())

    with pytest.raises(DataError, match=r"no images of 1 of the 3 classes of ILSVRC2012_devkit_t12.tar.gz \(n01443537\)"):
        forms.open_source(without(forms.TRAIN_TAR, "n01443537.tar"))
    with pytest.raises(DataError, match=r"1 of the 6 that ILSVRC2012_devkit.* lists are missing \(ILSVRC2012_val_00000004\)"):
        forms.open_source(without(forms.VAL_TAR, "ILSVRC2012_val_00000004.JPEG"))


@pytest.mark.parametrize(("suffix", "compress"), [("tgz", gzip), ("tar.gz", gzip), ("tar.bz2", bz2), ("tar.xz", lzma)])
def test_a_compressed_tar_is_read_and_leaves_nothing_behind(suffix, compress, tmp_path, capsys):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for split in ("train", "val"):
            for n, name in enumerate(("cat", "dog")):
                add_to_tar(archive, f"./set/{split}/{name}/1.png", encoded(photo(20, 24, seed=n), "PNG"))
    path = tmp_path / f"set.{suffix}"
    path.write_bytes(compress.compress(buffer.getvalue()))
    assert prepare(path, tmp_path / "packed") == 0
    assert "is compressed: it is uncompressed to" in capsys.readouterr().out
    packed = PackedSplit(tmp_path / "packed/train.arrow")
    assert [packed.name(i) for i in range(2)] == ["cat/1.png", "dog/1.png"]
    assert packed.read(1) == encoded(photo(20, 24, seed=1), "PNG")
    assert [p.name for p in (tmp_path / "packed").iterdir() if p.name.startswith(".")] == []
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], content[:-3], content[:-6] + bytes([content[-6] ^ 1]) + content[-5:]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="damaged or cut off"):
            prepare(path, tmp_path / "other")
        assert not (tmp_path / "other").exists()


def test_a_zip_cut_anywhere_is_refused(tmp_path):
    import zipfile

    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for split in ("train", "val"):
            archive.writestr(f"{split}/cat/1.png", encoded(photo(20, 24), "PNG"))
    content = (tmp_path / "set.zip").read_bytes()
    forms.open_source(tmp_path / "set.zip")
    for length in (10, len(content) // 2, len(content) - 30, len(content) - 1):
        (tmp_path / "set.zip").write_bytes(content[:length])
        with pytest.raises(DataError, match="damaged or cut off"):
            forms.open_source(tmp_path / "set.zip")


def test_hard_cases_of_names_in_a_tar(tmp_path):
    with tarfile.open(tmp_path / "set.tar", "w", encoding="utf-8", errors="surrogateescape") as archive:
        for split in ("train", "val"):
            add_to_tar(archive, f"{split}/caf\udce9/{'long' * 50}.png", b"1")
            add_to_tar(archive, f"{split}/.hidden/2.png", b"2")
    source = forms.open_source(tmp_path / "set.tar")
    assert source.classes == ["caf\\xe9"]
    assert [entry.name for entry in source.splits["train"]] == ["long" * 50 + ".png"]
    assert "note: left out of train: hidden or made by the system: 1 (train/.hidden)" in source.remarks


def test_uncompressed_copies_stay_for_the_same_command_alone(tmp_path, monkeypatch):
    def archive(name):
        with tarfile.open(tmp_path / name, "w:gz") as tar:
            for n, path in enumerate(("train/cat/1.png", "train/dog/1.png", "val/cat/1.png", "val/dog/1.png")):
                add_to_tar(tar, path, encoded(photo(20, 24, seed=n), "PNG"))
        return tmp_path / name

    def copies():
        return sorted(path.name for path in packed.glob(".*uncompressed*"))

    def killed(*arguments):
        raise KeyboardInterrupt

    packed, first, second = tmp_path / "packed", archive("first.tgz"), archive("second.tgz")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("prepare_data.pack_split", killed)
        prepare(first, packed)
    (copy,) = copies()
    (packed / f".1-{copy}.tmp").write_bytes(b"half of it, by a process that was killed")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("prepare_data.pack_split", killed)
        prepare(second, packed)
    assert len(copies()) == 1 and copies() != [copy]
    assert prepare(second, packed) == 0
    assert copies() == []
    with pytest.raises(DataError, match="--overwrite"):
        prepare(second, packed, "--shorter-side=12")
    assert copies() == []
