"""Fixtures for every test; nothing heavy is imported here."""

import os
import random
import sys
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(autouse=True)
def _seed():
    random.seed(0)
    np.random.seed(0)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of shared data beside the repository; CI, which has it, sets the variable so that no test skips it."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if folder.is_dir():
        return folder
    absent = f"shared data absent: there is no {folder}"
    if os.environ.get("DPAL_EDGE_REQUIRE_SHARED") == "1":
        pytest.fail(absent)
    pytest.skip(absent)
