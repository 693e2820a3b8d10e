"""Profiles of hypothesis: the same few examples at every run, or many new ones (``--hypothesis-profile soak``).

``HYPOTHESIS_PROFILE=soak`` asks for the same where these tests are not named on the command line.
"""

from __future__ import annotations

import os
import sys

import pytest

pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, settings

COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.differing_executors]}
settings.register_profile("few", max_examples=20, derandomize=True, database=None, **COMMON)
settings.register_profile("soak", max_examples=1000, database=None, print_blob=True, **COMMON)
if not any(argument.startswith("--hypothesis-profile") for argument in sys.argv):
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "few"))
