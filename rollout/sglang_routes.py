"""The routes of one SGLang server: everything that the client knows of SGLang's native HTTP interface.

Read from the source of sglang 0.5.23. tests/data/sglang_contract.json records the fields, and tests check
every request and answer of this file against it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from rollout.engine import ending
from rollout.servers import EngineUnavailable, Refused, Server, message_of
from rollout.types import FinishReason, Prompt, SamplingParams, Thought

BAN = -1e9
"""The bias of a banned token. SGLang bounds no bias, and a probability of e to the -1e9 is 0 in float64."""
SUPPORTED = ((0, 5, 23), (0, 6, 0))
"""SGLang versions whose routes this file knows: the first, and the first that is too new."""
NEEDED = ("version", "served_model_name", "max_req_input_len", "page_size", "enable_deterministic_inference")
"""What the client reads of /server_info."""
RESERVED = 4
"""`max_req_input_len` in /server_info is this much below the longest prompt plus thought. SGLang would cut
max_new_tokens above that without an error."""


@dataclass
class SGLangRoutes(Server):
    """One SGLang server."""

    product: ClassVar[str] = "SGLang"
    sampling_route: ClassVar[str] = "/generate"
    deterministic: ClassVar[bool] = True
    """Refuse a server that ignores seeds."""

    async def check(self, vocabulary: int | None = None, folder: Path | None = None) -> None:
        """Find at the start what would fail at the first sync, and note its model's card.

        SGLang reads any folder, so `folder` is not checked. Raises Refused if the server does not know the
        token, has another version or vocabulary, or ignores seeds.
        """
        answer = await self.client.get("/server_info")
        if answer.status_code in (401, 403):
            raise Refused(f"{self.url} does not know this token: set engine.token_file to the one it uses")
        if answer.status_code == 404:
            raise Refused(f"{self.url} has no route /server_info: it is no SGLang server, or one before 0.5")
        if answer.status_code != 200:
            raise EngineUnavailable(f"{self.url}/server_info answered {answer.status_code}")
        info = answer.json()
        missing = [name for name in NEEDED if name not in info]
        if missing:
            raise Refused(f"{self.url}/server_info has no {', '.join(missing)}: use SGLang's Python server")
        version = str(info["version"])
        if not _is_supported(version):
            known = " to below ".join(".".join(map(str, bound)) for bound in SUPPORTED)
            raise Refused(f"{self.url} runs SGLang {version}; its routes are known from {known}")
        if self.deterministic and not info["enable_deterministic_inference"]:
            raise Refused(
                f"{self.url} ignores seeds: start it with --enable-deterministic-inference, or set "
                "engine.deterministic to false (then the same run draws other thoughts each time)"
            )
        self.card = {
            "id": info["served_model_name"],
            "version": version,
            "max_model_len": info["max_req_input_len"] + RESERVED,
            "page_size": info["page_size"] or 1,
        }
        if vocabulary is not None:
            await self.check_vocabulary(vocabulary)

    async def check_vocabulary(self, size: int) -> None:
        """Raise Refused unless the server's model has `size` tokens: it would not take the weights.

        SGLang refuses a bias of an id that its model does not have.
        """
        for token, word in ((size - 1, "fewer"), (size, "more")):
            body = self.request(Prompt((0,), ()), SamplingParams(1, temperature=0.0), 1, 0)
            body["sampling_params"][0]["logit_bias"] = {str(token): 0.0}
            answer = await self.client.post(self.sampling_route, json=body)
            if answer.status_code not in (200, 400):
                raise EngineUnavailable(
                    f"{self.url}{self.sampling_route} answered {answer.status_code}: {message_of(answer)}"
                )
            if (answer.status_code == 200) is (word == "more"):
                raise self.other_vocabulary(size, word)

    def request(self, prompt: Prompt, params: SamplingParams, n: int, seed: int) -> dict[str, Any]:
        """The body of `/generate`: the prompt `n` times, since samples of one request would share a seed.

        Every setting that changes the distribution is sent, because `--preferred-sampling-params` of the
        server fill the others. Raises ValueError for top-p or top-k: SGLang's log-probabilities are those
        before they truncate.
        """
        if params.top_p < 1 or params.top_k > 0:
            raise ValueError(
                "SGLang gives log-probabilities before top-p and top-k truncate, not those that thoughts are "
                f"drawn from: set sampling.top_p to 1 and sampling.top_k to 0 (got top_p={params.top_p}, "
                f"top_k={params.top_k}), or use engine vllm_server"
            )
        how = {
            "max_new_tokens": params.max_thought_tokens,
            "min_new_tokens": 0,
            "temperature": params.temperature,
            "top_p": 1.0,
            "top_k": -1,
            "min_p": 0.0,
            "frequency_penalty": 0.0,
            "presence_penalty": 0.0,
            "repetition_penalty": 1.0,
            "n": 1,
            "stop_token_ids": [*prompt.stop_ids, *params.eos_ids],
            "stop": list(prompt.stop_strings),
            "ignore_eos": False,  # true would switch stop_token_ids off as well
            "skip_special_tokens": False,
            "no_stop_trim": True,
        }
        if params.banned_ids:
            how["logit_bias"] = {str(token): BAN for token in params.banned_ids}
        return {
            "input_ids": [list(prompt.token_ids)] * n,
            "sampling_params": [how | {"sampling_seed": seed + k} for k in range(n)],
            "return_logprob": True,
            "logprob_start_len": -1,
            "stream": False,
        }

    def thoughts(
        self, body: Any, prompt: Prompt, params: SamplingParams, seed: int, version: int
    ) -> list[Thought] | None:
        """The thoughts in the answer to `request`; None if one was aborted or spans two loads of weights.

        Raises KeyError for an answer of another form.
        """
        if not isinstance(body, list):
            raise KeyError(f"the answer is no list of samples: {str(body)[:100]}")
        metas = [sample["meta_info"] for sample in body]
        if any(meta["finish_reason"]["type"] == "abort" for meta in metas):
            return None
        if any(len({span["version"] for span in meta.get("weight_versions", ())}) > 1 for meta in metas):
            return None
        return [_thought(sample, prompt, params, seed + k, version) for k, sample in enumerate(body)]

    async def load_weights(self, folder: Path, mark: str) -> None:
        """Abort what others sample, load, empty the cache and note the mark: one request of SGLang.

        A failed load leaves unknown weights under the old mark. It is no Refused: SGLang answers 400 to a
        folder that is not there yet too.
        """
        route = "/update_weights_from_disk"
        call = {
            "model_path": str(folder),
            "load_format": "safetensors",
            "abort_all_requests": True,
            "flush_cache": True,
            "weight_version": mark,
        }
        answer = await self.client.post(route, json=call)
        if answer.status_code in (401, 403, 404):
            raise Refused(f"{self.url}{route} answered {answer.status_code}: {message_of(answer)}")
        if answer.status_code != 200 or not answer.json()["success"]:
            raise EngineUnavailable(f"{self.url}{route} answered {answer.status_code}: {message_of(answer)}")

    async def has_weights(self, mark: str, timeout: float) -> bool:
        """Whether it reports the weights of this mark."""
        answer = await self.client.get("/model_info", timeout=timeout)
        return answer.status_code == 200 and answer.json().get("weight_version") == mark

    async def empty_cache(self) -> None:
        """Empty the prefix cache."""
        await self.ask("/flush_cache")


class UnseededSGLangRoutes(SGLangRoutes):
    """One SGLang server that may ignore seeds."""

    deterministic: ClassVar[bool] = False


def _thought(sample: Any, prompt: Prompt, params: SamplingParams, seed: int, version: int) -> Thought:
    """One sample as a thought; an end-of-text id of the server's model ends it, whoever names it."""
    meta = sample["meta_info"]
    entries = meta["output_token_logprobs"]  # (log-prob, id, text) of each token
    ids, logps = tuple(int(entry[1]) for entry in entries), tuple(float(entry[0]) for entry in entries)
    if ids != tuple(sample["output_ids"]) or not all(map(math.isfinite, logps)):
        raise RuntimeError(
            f"a SGLang server gave {len(logps)} log-probs, some not finite or of other ids, for "
            f"{len(sample['output_ids'])} tokens"
        )
    matched = meta["finish_reason"].get("matched")
    reason = ending(ids, prompt, params, by_string=isinstance(matched, str))
    if reason is FinishReason.LENGTH and isinstance(matched, int):
        reason = FinishReason.EOS
    return Thought(ids, logps, reason, version, seed)


def _is_supported(version: str) -> bool:
    """Whether this file knows the routes of a SGLang version."""
    low, high = SUPPORTED
    parts = version.split("+")[0].split(".")[:3]
    numbers = tuple(int("".join(c for c in part if c.isdigit()) or 0) for part in parts)
    return low <= numbers < high
