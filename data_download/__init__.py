"""Data sets of the course: where they are, and the command that fetches them.

On the command line, from the repository's root::

    python data_download                      list everything, with what is present
    python data_download mnist-5k mni152      fetch
    python data_download --embedded           fetch the small ones that the current lessons need
    python data_download --check              hash what is present again

In Python, ``locate("mnist-5k", "mnist_5k.csv.gz")`` is the path of a file, or an error that names the command that
fetches it. Importing this package imports nothing but the standard library; ``fetch`` is in
``data_download.fetch``.
"""

from collections.abc import Mapping

from data_download.manifest import DataError, Entry, UnknownNameError
from data_download.manifest import entries as _entries
from data_download.store import locate, present, root

__all__ = ["DataError", "Entry", "UnknownNameError", "entries", "locate", "present", "root"]


def entries() -> Mapping[str, Entry]:
    """All data sets of the manifest by name."""
    return _entries()
