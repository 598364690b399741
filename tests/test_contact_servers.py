"""A trainer's first contact with `rlpretrain serve`: errors come before the first step (issue 15.22)."""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlpretrain import cli
from rlpretrain.corpora import dial
from tests.builders.engines import rows_of
from tests.builders.processes import ROOT, start
from tests.builders.runs import same, weights
from tests.builders.servers import free_port
from tests.builders.tiny import tiny_model, word_tokenizer

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi", reason="needs fastapi: make env LOCK=test-cpu")
pytestmark = pytest.mark.slow


class Service:
    """`rlpretrain serve` with the transformers engine, in a child process."""

    def __init__(self, folder: Path, words: list[str], port: int):
        self.url, self.log = f"http://127.0.0.1:{port}", folder / "service.log"
        command = ["-m", "rlpretrain.cli", *words, "--engine", "hf", "--port", str(port)]
        self.process = start(command, self.log)
        end = time.monotonic() + 250
        while True:
            try:
                if httpx.get(f"{self.url}/health").status_code == 200:
                    return
            except httpx.TransportError:
                if time.monotonic() > end or self.process.poll() is not None:
                    raise RuntimeError(self.log.read_text()[-2000:]) from None
                time.sleep(0.3)

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(30)


@pytest.fixture(scope="module")
def untagged(tmp_path_factory) -> Path:
    """A base whose tokenizer has no tags."""
    folder = tmp_path_factory.mktemp("untagged") / "base"
    tokenizer = word_tokenizer([word for word in dial.WORDS if word not in (dial.OPEN, dial.CLOSE)])
    tokenizer.save_pretrained(folder)
    tiny_model("qwen3", vocab_size=len(tokenizer), seed=3).save_pretrained(folder)
    return folder


def commands(file: str) -> dict[str, list[str]]:
    """The commands of a document's blocks on servers, by their second word."""
    lines = [
        line.split(" #")[0].rstrip() for line in (ROOT / file).read_text().replace("\\\n", " ").splitlines()
    ]
    found = [
        shlex.split(line) for line in lines if re.match(r"(mkdir|rlpretrain|VLLM_SERVER_DEV_MODE=1) ", line)
    ]
    return {
        words[1] if words[0] == "rlpretrain" else words[0].split("=")[0]: words
        for words in found
        if {"tag", "serve", "train", "-p"} & set(words) and {"runs/base", "/dev/shm/weights"} & set(words)
    }


def test_the_commands_work_as_printed(untagged, values, tmp_path, capsys):
    """Only the base, the folders, the port and the configuration are replaced."""
    said = commands("docs/rollout.md")
    assert {"tag", "serve", "train", "mkdir", "VLLM_SERVER_DEV_MODE"} <= set(said), said
    port = free_port()
    (tmp_path / "rlp.yaml").write_text(yaml.safe_dump(values | {"max_steps": 2, "objective": "rlp"}))
    here = {
        "MODEL": str(untagged),
        "runs/base": str(tmp_path / "base"),
        "/dev/shm/weights": str(tmp_path / "weights"),
        "rlp.yaml": str(tmp_path / "rlp.yaml"),
        "[http://127.0.0.1:8000]": f"[http://127.0.0.1:{port}]",
    }
    said = {name: [here.get(word, word) for word in words] for name, words in said.items()}
    assert str(tmp_path / "base") in said["VLLM_SERVER_DEV_MODE"]
    Path(said["mkdir"][-1]).mkdir(parents=True)
    assert cli.main(said["tag"][1:]) == 0 and "new to it: <think>, </think>" in capsys.readouterr().out
    service = Service(tmp_path, said["serve"][1:], port)
    try:
        assert cli.main(said["train"][1:]) == 0
    finally:
        service.close()
    assert "step 2" in capsys.readouterr().out or (Path(values["output_dir"]) / "model").is_dir()


@pytest.fixture(scope="module")
def service(untagged, tmp_path_factory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("service")
    (folder / "weights").mkdir()
    service = Service(folder, ["serve", str(untagged), "--weights-dir", str(folder / "weights")], free_port())
    service.weights = folder / "weights"
    yield service
    service.close()


def trained(values, tmp_path, capsys, **engine) -> tuple[int, str, float]:
    """Exit code, stderr and seconds."""
    path = tmp_path / "c.yaml"
    path.write_text(
        yaml.safe_dump(
            values | {"objective": "rlp", "engine": {"name": "vllm_server", "deadline": 60.0} | engine}
        )
    )
    begin = time.monotonic()
    code = cli.main(["train", str(path)])
    return code, capsys.readouterr().err, time.monotonic() - begin


def test_a_base_without_tags_is_refused_with_what_to_do(service, untagged, values, tmp_path, capsys):
    where = {"urls": [service.url], "weights_dir": str(service.weights)}
    code, error, took = trained(values | {"model": str(untagged)}, tmp_path, capsys, **where)
    size = AutoModelForCausalLM.from_pretrained(untagged).config.vocab_size + 2
    assert code == 1 and took < 40 and "Traceback" not in error
    assert (
        f"serves a model of fewer than {size} tokens" in error and "rlpretrain tag MODEL --out DIR" in error
    )
    assert not (Path(values["output_dir"]) / "metrics.jsonl").exists()


def test_a_folder_that_the_server_may_not_read_is_refused(service, untagged, values, tmp_path, capsys):
    values = values | {"model": {"path": str(untagged)}}
    values["objective"] = {"name": "rlp", "open": "shows", "close": "."}
    path = tmp_path / "c.yaml"
    engine = {
        "name": "vllm_server",
        "urls": [service.url],
        "deadline": 60.0,
        "weights_dir": str(tmp_path / "elsewhere"),
    }
    path.write_text(yaml.safe_dump(values | {"engine": engine}))
    begin = time.monotonic()
    assert cli.main(["train", str(path)]) == 1 and time.monotonic() - begin < 40
    error = capsys.readouterr().err
    assert f"may not read engine.weights_dir, {tmp_path / 'elsewhere'}" in error and "--weights-dir" in error
    assert "Traceback" not in error and not (Path(values["output_dir"]) / "metrics.jsonl").exists()
    assert not list((tmp_path / "elsewhere").iterdir())


def test_who_is_waited_for_is_said_and_the_end_is_a_line(values, tmp_path, capsys):
    url = f"http://127.0.0.1:{free_port()}"
    code, error, _ = trained(values, tmp_path, capsys, urls=[url], deadline=3.0)
    first, *_, last = [line for line in error.splitlines() if url in line]
    assert re.match(
        rf"waiting for vLLM servers, [12] s more \(engine\.deadline\): {url}: ConnectError", first
    )
    assert code == 1 and last.startswith(
        f"rlpretrain: no vLLM server answered within 3 s ({url}: ConnectError"
    )
    assert "Traceback" not in error


def test_a_tagged_base_is_an_ordinary_checkpoint(untagged, tmp_path, capsys):
    assert cli.main(["tag", str(untagged), "--out", str(tmp_path / "base")]) == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert model.config.vocab_size == len(tokenizer) == tokenizer.convert_tokens_to_ids("</think>") + 1
    assert cli.main(["tag", str(untagged), "--out", str(tmp_path / "base")]) == 2  # nothing is written over
    assert cli.main(["tag", str(tmp_path / "base"), "--out", str(tmp_path / "again")]) == 0
    assert "it knew <think> and </think> already" in capsys.readouterr().out
    assert cli.main(["tag", str(untagged), "--out", str(tmp_path / "x"), "--objective", "ntp"]) == 2
    assert "no thoughts, so no tags" in capsys.readouterr().err


def test_a_run_that_sends_changes_is_the_run_that_sends_all_weights(values, tmp_path, capsys):
    """The same thoughts and weights, bit by bit, with a twentieth of the bytes after the first sync."""
    tiny_model("qwen3", len(dial.WORDS)).save_pretrained(tmp_path / "base")
    dial.tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "weights").mkdir()
    words = [
        "serve",
        str(tmp_path / "base"),
        "--weights-dir",
        str(tmp_path / "weights"),
        "--dtype",
        "bfloat16",
    ]
    service = Service(tmp_path, [*words, "--dtype", "bfloat16"], free_port())
    found, sent = {}, {}
    try:
        for transfer in ("file", "changes"):
            output = tmp_path / transfer
            run = values | {"model": str(tmp_path / "base"), "output_dir": str(output), "max_steps": 3}
            run["optim"] = {"lr": 1e-6}
            where = {"urls": [service.url], "weights_dir": str(tmp_path / "weights" / transfer)}
            code, error, _ = trained(run, tmp_path, capsys, **where, transfer=transfer, dtype="bfloat16")
            assert code == 0, error
            found[transfer] = weights(output / "model")
            sent[transfer] = [row["perf/weight_sync_mib"] for row in rows_of(output)]
    finally:
        service.close()
    assert same(found["file"], found["changes"])
    assert len(set(sent["file"])) == 1 and all(0 < s < sent["file"][0] / 20 for s in sent["changes"]), sent
