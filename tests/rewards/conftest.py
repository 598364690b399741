"""The annotations of `rewards` are checked in these tests: a copy of it is imported with the shapes
enforced.
"""

import sys
from collections.abc import Iterator

import pytest
from jaxtyping import config, install_import_hook

for _name in [name for name in sys.modules if name.partition(".")[0] == "rewards"]:
    del sys.modules[_name]  # imported without the checks, by the suite's own conftest
with install_import_hook("rewards", "beartype.beartype"):
    import rewards  # noqa: F401


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Annotations off, as for a user: wrong shapes then reach the library's own errors."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)
