"""Names of modules from before the folders: they mean the same modules, and say where these are now."""

from __future__ import annotations

import importlib
import sys

import pytest

from rlpretrain.moved import MOVED


@pytest.mark.parametrize(("old", "new"), MOVED.items())
def test_an_old_name_is_the_module_of_the_new_one(old, new):
    sys.modules.pop(f"rlpretrain.{old}", None)
    with pytest.warns(DeprecationWarning, match=f"rlpretrain.{old} is rlpretrain.{new} now"):
        module = importlib.import_module(f"rlpretrain.{old}")
    assert module is importlib.import_module(f"rlpretrain.{new}")
    assert module.__name__ == module.__spec__.name == f"rlpretrain.{new}"


def test_names_that_became_folders_keep_what_scripts_took_from_them():
    from rlpretrain.models import load_model, load_tokenizer, save_model  # noqa: F401
    from rlpretrain.scoring import Scorer, check_head, score  # noqa: F401
    from rlpretrain.trl import InformationGainReward, ObjectiveReward, to_prompt_dataset  # noqa: F401


def test_a_name_that_never_was_is_not_found():
    with pytest.raises(ModuleNotFoundError, match="rlpretrain.nowhere"):
        importlib.import_module("rlpretrain.nowhere")
