"""Fingerprints of tokenizers: equal where two tokenizers give the same ids for every text."""

from __future__ import annotations

import json
from importlib.metadata import version
from typing import Any

from datasets.fingerprint import Hasher

PROBE = "Ab ab  don't 2+2=4, 1234 naïve ½ 漢字🙂\n\n\tx(y)  "
"""A text of many kinds of characters: tokenizers that give different ids for it are not the same."""
NOT_OF_IDS = frozenset(
    {
        "name_or_path",
        "init_kwargs",
        "init_inputs",
        "chat_template",
        "model_max_length",
        "padding_side",
        "truncation_side",
        "verbose",
        "deprecation_warnings",
        "cache",
        "model_input_names",
    }
)
"""Attributes of a tokenizer that have no influence on ids."""


def fingerprint(tokenizer: Any) -> str:
    """Changes with everything in a tokenizer that can change the ids of a text, and with nothing else.

    A fast tokenizer is described by its serialised `tokenizers` object, one in Python by its vocabulary, its
    plain attributes and its model. Both include their special tokens and the ids of `PROBE`, since a subclass
    may change ids without changing its state. Folders, chat templates and padding do not count.
    """
    probe = PROBE + "".join(map(str, tokenizer.all_special_tokens))
    special_ids = {
        name: getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "unk", "sep", "cls")
    }
    about = [
        type(tokenizer).__name__,
        special_ids,
        bool(getattr(tokenizer, "split_special_tokens", False)),
        *(list(tokenizer(probe, add_special_tokens=on, verbose=False)["input_ids"]) for on in (False, True)),
    ]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = _state_of_backend(backend) if backend is not None else _state_in_python(tokenizer)
    written = json.dumps([about, state], sort_keys=True)  # hashed as one string: many objects are slow
    return Hasher.hash(written)


def vocabulary_fingerprint(tokenizer: Any) -> str:
    """Changes with what can change the ids of an ordinary text.

    Unlike `fingerprint` it does not depend on the class, nor on which tokens have a role: a base checkpoint
    and a chat model made from it often differ in their end-of-text token alone.
    """
    probe = list(tokenizer(PROBE, verbose=False)["input_ids"])
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = _state_of_backend(backend) if backend is not None else _state_in_python(tokenizer)
    return Hasher.hash(json.dumps([probe, tokenizer.get_vocab(), state], sort_keys=True))


def older_fingerprint(tokenizer: Any) -> str:
    """The fingerprint in checkpoints older than `fingerprint`.

    It misses changes that the serialised `tokenizers` object does not contain.
    """
    probe, bos = tokenizer("a")["input_ids"], tokenizer.bos_token_id
    lead = [bos] if bos is not None and probe[:1] == [bos] else []
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = _state_of_backend(backend) if backend is not None else tokenizer.get_vocab()
    for leftover in ("truncation", "padding"):
        state.pop(leftover, None)
    return Hasher.hash([type(tokenizer).__name__, json.dumps(state, sort_keys=True), lead])


def library_versions() -> list[str]:
    """Versions of the libraries that turn texts into ids."""
    return [version(name) for name in ("tokenizers", "transformers")]


def _state_of_backend(backend: Any) -> dict[str, Any]:
    state = json.loads(backend.to_str())
    for leftover in ("truncation", "padding"):  # of earlier calls
        state.pop(leftover, None)
    return state


def _state_in_python(tokenizer: Any) -> dict[str, Any]:
    state: dict[str, Any] = {"vocabulary": tokenizer.get_vocab()}
    for name, value in vars(tokenizer).items():
        plain = isinstance(value, bool | int | float | str | list | tuple | dict | set | frozenset)
        if plain and not name.startswith("_") and name not in NOT_OF_IDS and "file" not in name:
            state[name] = _ordered(value)
    model = getattr(tokenizer, "sp_model", None)
    if model is not None:
        state["model"] = Hasher.hash(model.serialized_model_proto())
    return state


def _ordered(value: Any) -> Any:
    """A text, or a sorted list of texts, that is the same for equal values."""
    if isinstance(value, dict):
        return sorted(map(repr, value.items()))
    if isinstance(value, set | frozenset):
        return sorted(map(repr, value))
    return repr(value)
