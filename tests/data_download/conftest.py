"""Fixtures for the downloads: a local server, a data root of their own, no waiting between attempts."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import Server, serve

from data_download import manifest, transfer


@pytest.fixture
def server() -> Iterator[Server]:
    with serve() as running:
        yield running


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty data root; nothing of the user's own settings is seen."""
    for variable in ("REGTEACH_DATA", "REGTEACH_MIRROR"):
        monkeypatch.delenv(variable, raising=False)
    folder = tmp_path / "root"
    folder.mkdir()
    return folder


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "PAUSE_SECONDS", 0.0)


@pytest.fixture(autouse=True)
def _fresh_manifests() -> None:
    manifest.entries.cache_clear()
