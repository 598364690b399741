"""What the client knows of one server of any kind, and the errors of such servers.

A subclass has the routes of one product (`vllm_routes`, `sglang_routes`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from rollout.types import Prompt, SamplingParams, Thought

TRANSIENT = (408, 425, 429)
"""4xx answers after which the same request may succeed later."""


class EngineUnavailable(RuntimeError):
    """No server answered within the deadline; the message has the last error of each."""

    says_all = True  # a command line prints the message without a traceback


class Refused(EngineUnavailable):
    """A server refuses, and would refuse again. The message says what to do."""


@dataclass
class Server(ABC):
    """What the client knows of one server; `client` is its httpx client."""

    product: ClassVar[str]
    """What messages call it."""
    sampling_route: ClassVar[str]
    """The route that `request` is posted to."""

    url: str
    load: int = 0  # prompts assigned to it, those that wait for a slot included
    in_flight: int = 0
    alive: bool = True
    last_error: str = ""
    failures: int = 0
    card: dict[str, Any] = field(default_factory=dict)  # facts of its model; always max_model_len
    client: Any = field(default=None, repr=False)
    group: Any = field(default=None, repr=False)  # its NCCL group
    ours: bool = False  # `rlpretrain serve`, not vLLM's server
    version: int = 0  # of its weights
    loading: int = 0  # the version that it was given last, or is given now
    keeps: bool = False  # it goes on with the same thoughts after weights were loaded
    wants_changes: bool = False  # it must be able to load the changes of weights alone
    stuck: int = 0  # how often it gave the same error to the weights; above 1 it is no longer waited for

    def facts(self) -> dict[str, Any]:
        """What `/health` and run.json say of it."""
        return {name: value for name, value in vars(self).items() if name not in ("client", "group")}

    def note_refusal(self, error: Exception) -> None:
        """Note an error that came in place of taking weights, and count how often it was the same."""
        if isinstance(error, Refused):
            self.stuck = 2
        elif isinstance(error, EngineUnavailable):
            self.stuck = self.stuck + 1 if str(error) in self.last_error else 1
        else:
            self.stuck = 0
        self.last_error = str(error) if isinstance(error, EngineUnavailable) else repr(error)

    async def healthy(self, timeout: float | None = None) -> bool:
        """Whether it reports health; connection errors are raised."""
        answer = await self.client.get("/health", **({"timeout": timeout} if timeout else {}))
        return answer.status_code == 200

    async def ask(self, route: str, **request: Any) -> Any:
        """POST; EngineUnavailable for every answer but 200, Refused where asking again cannot help."""
        answer = await self.client.post(route, **request)
        if answer.status_code != 200:
            is_final = 400 <= answer.status_code < 500 and answer.status_code not in TRANSIENT
            kind = Refused if is_final else EngineUnavailable
            raise kind(f"{self.url}{route} answered {answer.status_code}: {message_of(answer)}")
        return answer

    def other_vocabulary(self, size: int, word: str) -> Refused:
        """The error that its model has `word` (more or fewer) tokens than the `size` of the trained one."""
        return Refused(
            f"{self.url} serves a model of {word} than {size} tokens, and this run trains one of {size}: "
            "both must begin with the same checkpoint. Where the run adds the tags of a thought, write a "
            "base that has them (rlpretrain tag MODEL --out DIR), serve DIR and train from it"
        )

    async def sample(self, body: Mapping[str, Any]) -> Any:
        """Its answer to `request`."""
        return await self.client.post(self.sampling_route, json=body)

    # what a product's routes are

    @abstractmethod
    async def check(self, vocabulary: int | None = None, folder: Path | None = None) -> None:
        """Find at the start what would fail at the first sync, and note its model's card.

        Raises Refused if it does not know the token, the routes, the vocabulary or the folder.
        """

    @abstractmethod
    def request(self, prompt: Prompt, params: SamplingParams, n: int, seed: int) -> dict[str, Any]:
        """The body that samples `n` thoughts."""

    @abstractmethod
    def thoughts(
        self, body: Any, prompt: Prompt, params: SamplingParams, seed: int, version: int
    ) -> list[Thought] | None:
        """The thoughts in the answer to `request`; None if the server aborted one.

        Raises KeyError for an answer of another form.
        """

    @abstractmethod
    async def load_weights(self, folder: Path, mark: str) -> None:
        """Load the weights of a folder, empty the caches, note the mark; nothing is sampled meanwhile."""

    @abstractmethod
    async def has_weights(self, mark: str, timeout: float) -> bool:
        """Whether it reports the weights of this mark."""

    @abstractmethod
    async def empty_cache(self) -> None:
        """Empty the prefix cache."""

    async def receive_weights(
        self, state: Mapping[str, Any], mark: str, host: str | None, timeout: float
    ) -> None:
        """`load_weights` over NCCL."""
        raise Refused(f"{self.url} takes weights by files only: set engine.transfer to file")


def body_of(answer: Any) -> Any:
    """The JSON of an answer; KeyError, as for JSON of another form, if it is not JSON.

    The server is at fault then, and not the request.
    """
    try:
        return answer.json()
    except ValueError as error:
        raise KeyError(f"the answer is not JSON: {error}") from None


def message_of(answer: Any) -> str:
    """The message of an error answer, on one line."""
    try:
        message = answer.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = answer.text
    return " ".join(str(message).split())[:300]
