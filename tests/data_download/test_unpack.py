"""Hostile archives are refused before anything is placed; good ones come out as they are."""

import gzip
import tarfile
from pathlib import Path

import pytest
from serving import sha256, tar_of, tar_special, zip_link, zip_of

from data_download import unpack as module
from data_download.manifest import Archive, DataError, Member
from data_download.unpack import place_as_is, safe_name, unpack

GOOD = {"data/images/a.txt": b"alpha", "data/labels/b.txt": b"beta", "data/readme": b"gamma"}


def opened(tmp_path: Path, content: bytes, kind: str, allowed: int = 1000, **keys) -> dict[str, str]:
    path, target = tmp_path / f"archive.{kind}", tmp_path / "target"
    path.write_bytes(content)
    target.mkdir()
    return unpack(path, Archive(file=path.name, size=len(content), unpack=kind, **keys), target, allowed)


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz", "tar.xz"])
def test_a_good_archive_comes_out_whole_with_its_hashes(kind: str, tmp_path: Path) -> None:
    mode = {"tar": "w", "tar.gz": "w:gz", "tar.xz": "w:xz"}.get(kind)
    content = tar_of(GOOD, mode) if mode else zip_of(GOOD)
    files = opened(tmp_path, content, kind[:3])
    assert tree(tmp_path / "target") == GOOD
    assert files == {name: sha256(data) for name, data in GOOD.items()}


@pytest.mark.parametrize("make", [zip_of, tar_of])
def test_strip_keep_and_flat(make, tmp_path: Path) -> None:
    kind = "zip" if make is zip_of else "tar"
    files = GOOD | {"data/images/._a.txt": b"left by macOS", "./data/images/c.txt": b"delta"}
    opened(tmp_path, make(files), kind, strip=1, keep=("images/*", "read*"))
    assert tree(tmp_path / "target") == {"images/a.txt": b"alpha", "readme": b"gamma", "images/c.txt": b"delta"}


def test_flat_drops_folders(tmp_path: Path) -> None:
    opened(tmp_path, zip_of(GOOD), "zip", keep=("*.txt",), flat=True)
    assert tree(tmp_path / "target") == {"a.txt": b"alpha", "b.txt": b"beta"}


def test_members_are_taken_by_name_and_hashed(tmp_path: Path) -> None:
    member = Member("data/labels/b.txt", "labels.txt", 4, sha256(b"beta"))
    assert opened(tmp_path, zip_of(GOOD), "zip", members=(member,)) == {"labels.txt": sha256(b"beta")}
    assert tree(tmp_path / "target") == {"labels.txt": b"beta"}


@pytest.mark.parametrize(
    ("member", "words"),
    [
        (Member("data/none.txt", "x", 1, "0" * 64), "does not hold data/none.txt"),
        (Member("data/readme", "x", 5, "0" * 64), "data/readme in archive.tar is not the file that the manifest"),
    ],
)
def test_a_missing_or_changed_member_is_refused(member: Member, words: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=words):
        opened(tmp_path, tar_of(GOOD), "tar", members=(member,))


@pytest.mark.parametrize("make", [zip_of, tar_of])
@pytest.mark.parametrize(
    "name", ["../evil", "data/../../evil", "/etc/evil", "C:/evil", "c:evil", "..\\evil", "data\\..\\..\\evil"]
)
def test_an_archive_that_climbs_out_is_refused(make, name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"was refused: its member .* would climb out of the folder\.") as caught:
        opened(tmp_path, make({"a.txt": b"plain", name: b"evil"}), "zip" if make is zip_of else "tar")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("*evil*"))


def test_a_climbing_member_is_refused_even_if_it_would_be_left_out(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="climb out"):
        opened(tmp_path, tar_of({"a.txt": b"a", "../evil": b"evil"}), "tar", keep=("*.txt",))


@pytest.mark.parametrize(
    "content",
    [
        tar_special(tarfile.SYMTYPE, "link", "/etc/passwd"),
        tar_special(tarfile.SYMTYPE, "link", "a.txt"),  # even one that points inside
        tar_special(tarfile.LNKTYPE, "link", "../../../etc/passwd"),
        tar_special(tarfile.LNKTYPE, "link", "a.txt"),
        tar_special(tarfile.CHRTYPE, "device"),
        tar_special(tarfile.BLKTYPE, "device"),
        tar_special(tarfile.FIFOTYPE, "pipe"),
        zip_link("link", "/etc/passwd"),
    ],
    ids=["symlink", "symlink-inside", "hardlink", "hardlink-inside", "char", "block", "fifo", "zip-symlink"],
)
def test_links_and_devices_are_refused(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is a link or a device, not a plain file"):
        opened(tmp_path, content, "zip" if content[:2] == b"PK" else "tar")
    assert not any(path.is_symlink() for path in tmp_path.rglob("*"))


def bomb(kind: str, size: int) -> bytes:
    zeros = bytes(size)
    return {
        "zip": lambda: zip_of({"zeros": zeros}),
        "tar": lambda: tar_of({"zeros": zeros}, "w:gz"),
        "gz": lambda: gzip.compress(zeros),
    }[kind]()


@pytest.mark.parametrize("kind", ["zip", "tar", "gz"])
def test_a_bomb_is_refused_and_not_written_out(kind: str, tmp_path: Path) -> None:
    content = bomb(kind, 8 << 20)
    assert len(content) < 20_000
    with pytest.raises(DataError, match=r"unpacks to far more than the 0\.1 MB that are stated"):
        opened(tmp_path, content, kind, allowed=100_000, to="zeros")
    assert sum(p.stat().st_size for p in (tmp_path / "target").rglob("*") if p.is_file()) < 2 << 20


def test_a_zip_that_lies_about_its_size_is_caught_while_it_is_written(tmp_path: Path) -> None:
    content = bytearray(zip_of({"zeros": bytes(8 << 20)}))
    true, lie = (8 << 20).to_bytes(4, "little"), (100).to_bytes(4, "little")
    while (at := content.find(true)) >= 0:
        content[at : at + 4] = lie
    with pytest.raises(DataError, match=r"is not a whole zip archive|far more"):
        opened(tmp_path, bytes(content), "zip", allowed=1000)


def test_many_small_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_FILES", 10)
    with pytest.raises(DataError, match="holds more than 10 files"):
        opened(tmp_path, zip_of({f"{k}.txt": b"" for k in range(11)}), "zip")


def test_a_size_that_was_rounded_is_let_through(tmp_path: Path) -> None:
    opened(tmp_path, zip_of({"a": bytes(150_000)}), "zip", allowed=100_000)


@pytest.mark.parametrize("second", ["a.txt", "./a.txt", "a.txt/b"])
def test_two_members_in_one_place_are_refused(second: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="twice"):
        opened(tmp_path, tar_of({"a.txt": b"one", second: b"two"}) if second != "a.txt" else _twice(), "tar")


def _twice() -> bytes:
    return tar_of({"a.txt": b"one"})[:1024] + tar_of({"a.txt": b"two"})


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("zip", b"<html>please log in</html>" * 100),
        ("tar", b"<html>please log in</html>" * 100),
        ("gz", b"<html>please log in</html>"),
        ("zip", zip_of(GOOD)[:-40]),
        ("tar", tar_of({"a": bytes(5000)})[:2000]),
        ("tar", tar_of(GOOD, "w:gz")[:-30]),
        ("gz", gzip.compress(bytes(range(256)) * 20)[:-20]),
    ],
)
def test_a_broken_archive_gives_one_sentence(kind: str, content: bytes, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"is not a whole {kind} archive"):
        opened(tmp_path, content, kind, allowed=10_000, to="a")


def test_a_gz_is_one_file_with_the_name_that_the_manifest_gives(tmp_path: Path) -> None:
    opened(tmp_path, gzip.compress(b"digits"), "gz", to="raw/digits")
    assert tree(tmp_path / "target") == {"raw/digits": b"digits"}


def test_a_plain_file_is_copied_under_its_name(tmp_path: Path) -> None:
    source, target = tmp_path / "unzip_here.zip", tmp_path / "target"
    source.write_bytes(b"as it is")
    target.mkdir()
    assert place_as_is(source, Archive("unzip_here.zip", 8, to="synth2d.zip"), target) == {
        "synth2d.zip": sha256(b"as it is")
    }
    assert source.exists()


def test_safe_names_are_left_alone() -> None:
    assert safe_name("./a//b/./c", "z").as_posix() == "a/b/c"
    assert safe_name("..name/a..b", "z").as_posix() == "..name/a..b"
