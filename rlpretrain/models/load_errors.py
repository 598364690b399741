"""Why a checkpoint or a tokenizer could not be loaded, in one line."""

from __future__ import annotations

from pathlib import Path

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def explain_folder(path: str) -> str:
    """Return what a folder that holds no model is, or "" if that is not known."""
    folder = Path(path)
    if (folder / "adapter_config.json").is_file():
        return "it is an adapter; the merged model of a run is `model` beside it"
    if (folder / "run.json").is_file():
        return f"it is a run's folder, the model is {folder / 'model'}"
    if folder.is_file():
        return "it is a file; name a folder with config.json and the weights"
    if not folder.is_dir() or (folder / "config.json").is_file():
        return ""
    names = sorted(file.name for file in folder.iterdir())
    if not names:
        return "the folder is empty"
    if any(name.endswith(".gguf") for name in names):
        return (
            "it holds GGUF files, which are for inference: give the checkpoint they were made from "
            "(config.json, safetensors)"
        )
    if any(name.startswith("tokenizer") for name in names):
        return ""
    listed = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return f"the folder has no config.json; it holds {listed}"


def explain_tokenizer_error(path: str, error: BaseException) -> str:
    """Return why a tokenizer could not be loaded from `path`.

    transformers' own message for a folder without tokenizer files is a list of what it tried.
    """
    if known := explain_folder(path):
        return known
    folder = Path(path)
    if (folder / "config.json").is_file() and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return (
            f"none of its files is there ({', '.join(TOKENIZER_FILES[:3])}, ...): copy them, or name a "
            "model.tokenizer that has them"
        )
    return explain_load_error(path, error)


def explain_model_error(path: str, error: BaseException) -> str:
    """Return why a model could not be loaded from `path`."""
    return explain_folder(path) or explain_load_error(path, error)


def explain_load_error(path: str, error: BaseException) -> str:
    """Return the error in one line, or that a local folder does not exist."""
    is_local = path.startswith((".", "/", "~")) or path.count("/") > 1
    if is_local and not Path(path).exists():
        return "no such folder"  # transformers' message is about hub ids
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    if not lines[0].endswith((":", ",")):
        return lines[0]
    return " ".join(" ".join(lines).split())[:300]


def only_config(path: str) -> bool:
    """Return whether a folder has a model configuration but no weights."""
    folder = Path(path)
    has_weights = any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))
    return (folder / "config.json").is_file() and not has_weights
