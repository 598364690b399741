"""Texts for TRL prompts."""

from __future__ import annotations

import pytest

from tests.builders.tokenizers_family import LINES

trl = pytest.importorskip("trl")


LONG = [f"{a} {b}" for a in LINES for b in LINES]
