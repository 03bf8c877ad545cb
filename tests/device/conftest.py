"""The tests of a device: in processes of their own, where every Trainer chooses it.

``PYROLORA_DEVICE=mock pytest tests/device``, as `make test` calls it.
"""

from __future__ import annotations

import os

import pytest

ASKED = os.environ.get("PYROLORA_DEVICE") == "mock"
collect_ignore_glob = [] if ASKED else ["test_*.py"]


@pytest.fixture(autouse=True, scope="session")
def _device() -> None:
    import mock_device

    if mock_device.COMPILER is None:
        pytest.skip("the device is compiled, and there is no c++")
    mock_device.load()
