"""What this machine has and what it lacks for the course: `regteach doctor`.

Standard library only, so that it also speaks where nothing is set up. Each line says ok, note (the course runs
without it) or MISSING (it does not), and what to do.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass

from regteach import bootstrap

OK, NOTE, MISSING = "ok", "note", "MISSING"
MEMORY_GB, DISK_GB, SETUP_GB = 4.0, 1.0, 6.0

_PROBE = """
import json, warnings
warnings.simplefilter("ignore")
import torch
found = {"torch": torch.__version__, "threads": torch.get_num_threads(), "cuda": torch.version.cuda, "devices": []}
if torch.cuda.is_available():
    for i in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(i)
        found["devices"].append([about.name, about.total_memory / 1e9])
try:
    import torchvision
    from torchvision.ops import nms
    nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
    found["torchvision"] = [torchvision.__version__, ""]
except Exception as error:
    from importlib.metadata import version
    found["torchvision"] = [version("torchvision"), f"{type(error).__name__}: {error}"]
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Args:
        state: ok, note or MISSING.
        what: its name.
        found: what was found.
        to_do: what to do about it; empty when nothing is.
    """

    state: str
    what: str
    found: str
    to_do: str = ""


def main(argv: list[str] | None = None) -> int:
    """Print the findings.

    Returns:
        0 where the course can run, 1 where something that it needs is missing.
    """
    if argv:
        print("usage: python -m regteach doctor", file=sys.stderr)
        return 2
    findings = examine()
    for finding in findings:
        print(f"{finding.state:<8}{finding.what:<13}{finding.found}")
        if finding.to_do:
            print(f"{'':<21}-> {finding.to_do}")
    missing = [finding.what for finding in findings if finding.state == MISSING]
    print(f"\nThe course cannot run yet: {', '.join(missing)}." if missing else "\nThe course can run.")
    return int(bool(missing))


def examine() -> list[Finding]:
    """Look at everything; each look stands by itself."""
    findings = [_python()]
    supported = findings[0].state == OK
    lacking = bootstrap.lacking(bootstrap.ROOT, test=False) if supported else []
    if supported:
        findings.append(_packages(lacking))
        findings.append(_test_tools())
    if supported and not any(words.startswith("torch ") for words in lacking):
        findings += _torch()
    findings += [_memory(), _disk(ready=supported and not lacking)]
    if supported and not lacking:
        findings += _data()
    return [*findings, _chromium()]


def _python() -> Finding:
    version = sys.version_info[:2]
    found = f"{platform.python_version()} ({sys.executable})"
    if version in bootstrap.SUPPORTED:
        return Finding(OK, "Python", found)
    return Finding(MISSING, "Python", found, "install Python 3.11, 3.12 or 3.13 and run this with it")


def _packages(lacking: list[str]) -> Finding:
    wanted = len(bootstrap.direct(bootstrap.ROOT, test=False))
    if not lacking:
        return Finding(OK, "packages", f"all {wanted} that the course names, at the lock's versions")
    shown = "; ".join(lacking[:3]) + (f"; and {len(lacking) - 3} more" if len(lacking) > 3 else "")
    to_do = "python -m regteach course sets up .venv with the right ones"
    return Finding(MISSING, "packages", f"{len(lacking)} of {wanted} are not as locked: {shown}", to_do)


def _test_tools() -> Finding:
    own = set(bootstrap.lacking(bootstrap.ROOT, test=False))
    lacking = [words for words in bootstrap.lacking(bootstrap.ROOT, test=True) if words not in own]
    if not lacking:
        return Finding(OK, "test tools", "all, at the lock's versions")
    to_do = "only developers want them: python -m regteach test installs them"
    return Finding(NOTE, "test tools", f"{len(lacking)} lacking", to_do)


def _torch() -> list[Finding]:
    done = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True, timeout=300)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no word"])[-1]
        to_do = f"delete {bootstrap.ROOT / '.venv'} and run python -m regteach course"
        return [Finding(MISSING, "torch", f"does not load: {last}", to_do)]
    found = json.loads(done.stdout)
    findings = [Finding(OK, "torch", f"{found['torch']}, {found['threads']} threads")]
    version, trouble = found["torchvision"]
    if trouble:
        told = f"{version} does not load with torch {found['torch']} ({trouble.splitlines()[0]})"
        to_do = "the course runs without it; to use it, install torch and torchvision anew from one and the same index"
        findings.append(Finding(NOTE, "torchvision", told, to_do))
    else:
        findings.append(Finding(OK, "torchvision", f"{version}, fits torch"))
    devices = [f"{name} with {memory:.0f} GB" for name, memory in found["devices"]]
    if devices:
        findings.append(Finding(OK, "device", f"CUDA {found['cuda']}: {', '.join(devices)}"))
    else:
        told = f"CPU, {os.cpu_count()} cores; no GPU that torch can use, and none is needed"
        findings.append(Finding(OK, "device", told))
    return findings


def _memory() -> Finding:
    total = _total_memory_gb()
    if total is None:
        return Finding(NOTE, "memory", "unknown", f"the course wants {MEMORY_GB:.0f} GB")
    if total < MEMORY_GB:
        return Finding(NOTE, "memory", f"{total:.1f} GB", "close other programs, and use: regteach course --jobs 1")
    return Finding(OK, "memory", f"{total:.1f} GB")


def _total_memory_gb() -> float | None:
    try:
        import psutil
    except ModuleNotFoundError:
        try:
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
        except (AttributeError, ValueError, OSError):  # Windows has no sysconf
            return None
    return psutil.virtual_memory().total / 1e9


def _disk(ready: bool) -> Finding:
    free, needed = shutil.disk_usage(str(bootstrap.ROOT)).free / 1e9, DISK_GB if ready else SETUP_GB
    found = f"{free:.0f} GB free beside the course"
    if free < needed:
        return Finding(MISSING, "disk", found, f"{needed:.0f} GB are needed")
    return Finding(OK, "disk", found)


def _data() -> list[Finding]:
    import data_download
    from data_download.store import presence

    states = {name: presence(entry, data_download.root()).state for name, entry in data_download.entries().items()}
    here = [name if state == "present" else f"{name} (partly)" for name, state in states.items() if state != "absent"]
    embedded = [name for name, entry in data_download.entries().items() if entry.embedded]
    lacking = [name for name in embedded if states[name] != "present"]
    found = f"{len(here)} of {len(data_download.entries())} sets in {data_download.root()}: {', '.join(here) or 'none'}"
    if lacking:
        to_do = f"python -m regteach course fetches {', '.join(lacking)}; or: python data_download --embedded"
        return [Finding(MISSING, "data", found, to_do)]
    return [Finding(OK, "data", found)]


def _chromium() -> Finding:
    found = find_chromium()
    if found:
        return Finding(OK, "Chromium", found)
    return Finding(NOTE, "Chromium", "none on PATH", "only the browser tests want it; they are skipped without")


def find_chromium() -> str | None:
    """The path of a Chromium or Chrome, or None."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    places = (
        "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
        "/Applications/Chromium.app/Contents/MacOS/Chromium",
        os.path.expandvars(r"%ProgramFiles%\Google\Chrome\Application\chrome.exe"),
    )
    return next(filter(None, map(shutil.which, (*names, *places))), None)
