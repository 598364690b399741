"""Section `engine`: what samples the thoughts.

`EngineConfig` has the settings that all engines share. Each engine has a subclass with its own settings and
with the facts that the rest of the library asks for. To add an engine, write its subclass, list it in
`BUILT_IN`, and let `factory` name the function that makes the engine of a
`rlpretrain.rollouts.engines.EngineContext`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import MISSING, fields
from dataclasses import field as _field
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator
from pydantic.dataclasses import dataclass
from pydantic_core import InitErrorDetails, PydanticCustomError

from rlpretrain.config.base import STRICT, Amount, Count, PathText, Varied, as_fields, headed

Seconds = Annotated[float, Field(gt=0)]


@dataclass(config=STRICT, kw_only=True)
class EngineConfig(Varied):
    """What samples the thoughts. `EngineConfig(name=...)` makes the class of the engine of that name."""

    factory: ClassVar[str] = ""
    """package.module:function that makes the engine from an EngineContext."""
    in_process: ClassVar[bool] = False
    """It computes in the training process, on the device of the policy."""
    reads_policy: ClassVar[bool] = False
    """It samples with the trainer's module, or a copy of it."""
    loads_from_disk: ClassVar[bool] = True
    """It reads the starting model from a folder; the run writes one if `model.path` holds another model."""
    takes_adapters: ClassVar[bool] = False
    """`policy.lora.sync: adapter` works with it."""

    name: Literal["hf", "vllm_local", "vllm_server", "sglang_server", "ray"] | str = "hf"
    """hf: transformers in the training process, sharing its weights. vllm_local: vLLM there. vllm_server,
    sglang_server: servers at `urls`. ray: `num_engines` of kind `of` as Ray actors. package.module:Class: an
    engine of your own.
    """
    batch_size: Count = 256
    """Most thoughts decoded at once."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """vLLM's precision, or that in which weights are sent to servers; the model's by default."""
    max_staleness: Annotated[int, Field(ge=0)] = 0
    """Steps that thoughts may be sampled ahead of the update that uses them; 0 is synchronous and
    deterministic.
    """
    in_flight: Count = 4
    """With max_staleness above 0, calls of the engine at a time; each samples a part of a step's
    positions.
    """
    probe_tolerance: Amount | None = None
    """Largest difference in nats between engine and trainer on the probe after a sync; by default .001 on a
    CPU and .05 on a GPU, in half precision .5.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> EngineConfig:
        """An instance of the engine's own class; pydantic's `__init__` then reads the settings."""
        return object.__new__(cls.variant(kwargs) if cls is EngineConfig else cls)

    @classmethod
    def variants(cls) -> dict[str, type]:
        """The class of each engine, by name; `CUSTOM` is the class of engines outside the package."""
        return {**BUILT_IN, CUSTOM: CustomConfig}

    @classmethod
    def variant(cls, values: Mapping[str, Any]) -> type:
        """The class of the engine that `values` name."""
        name = str(values.get("name", "hf"))
        return BUILT_IN.get(name, CustomConfig if ":" in name else EngineConfig)

    @model_validator(mode="before")
    @classmethod
    def _only_its_own(cls, given: Any) -> Any:
        """Drop settings of other engines that are at their defaults; refuse the others."""
        if isinstance(given, EngineConfig):
            return given
        values = as_fields(given)
        values.setdefault("name", next((name for name, kind in BUILT_IN.items() if kind is cls), "hf"))
        if cls is EngineConfig or cls.variant(values) is not cls:
            raise _refusal({"name": _unknown(str(values["name"]), cls)}, values)
        kept = own_settings(values, cls)
        foreign = [key for key in values if key not in kept and _plain(values[key]) not in _defaults(key)]
        if foreign:
            text = "a setting of engine {}, and engine.name is {}"
            raise _refusal(
                {key: text.format(" or ".join(_owners(key)), values["name"]) for key in foreign}, values
            )
        return kept

    # what other parts of the library ask, as far as `engine` alone can tell

    @property
    def sleeps(self) -> bool:
        """It gives its device memory back while the model trains."""
        return False

    @property
    def reserved_gib(self) -> float | None:
        """GiB of the trainer's device that it reserves for keys and values."""
        return None

    @property
    def writes_weights(self) -> bool:
        """Each sync writes the weights to a folder."""
        return False

    def own_weights(self, sharded: bool) -> str:
        """Why it has weights of its own on the trainer's device, or nothing; `sharded`: ZeRO 3."""
        return ""

    def libraries(self) -> tuple[str, ...]:
        """Python modules that it needs and the core does not."""
        return ()

    def addresses(self) -> list[tuple[str, str]]:
        """(setting, URL) of each server that must answer."""
        return []

    def files(self) -> dict[str, str | None]:
        """Files that it reads, by setting."""
        return {}

    def memory_notes(self) -> list[str]:
        """What a table of the run's memory leaves out."""
        if self.in_process:
            return []
        return [f"engine {self.name}: what it needs on its own devices is not in this table"]


@dataclass(config=STRICT, kw_only=True)
class HFConfig(EngineConfig):
    """Transformers in the training process."""

    factory: ClassVar[str] = "rlpretrain.rollouts.factories:make_hf"
    in_process: ClassVar[bool] = True
    reads_policy: ClassVar[bool] = True
    loads_from_disk: ClassVar[bool] = False

    def own_weights(self, sharded: bool) -> str:
        """A copy is needed where the policy is sharded, or changes while thoughts are sampled."""
        if sharded:
            return "the policy's are sharded"
        return "they sample while the policy's change" if self.max_staleness else ""


@dataclass(config=STRICT, kw_only=True)
class VLLMConfig(EngineConfig):
    """What vLLM engines share that this library starts."""

    max_model_len: Count | None = None
    """vLLM's longest context plus thought in tokens; by default documents, thoughts and template together."""
    kv_cache_gib: Annotated[float, Field(gt=0)] | None = 0.5
    """vLLM's key-value cache in GiB; null on a GPU leaves it to gpu_memory_utilization."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.3
    """Share of the device that vLLM may take where kv_cache_gib is null."""
    block_size: Count | None = None
    """Tokens per block of vLLM's prefix cache; its own choice on a GPU, 32 on a CPU."""
    options: dict[str, Any] = _field(default_factory=dict)
    """Further arguments of vllm.LLM, as they are; of an engine of your own, what it makes of them."""


@dataclass(config=STRICT, kw_only=True)
class VLLMLocalConfig(VLLMConfig):
    """vLLM in the training process."""

    factory: ClassVar[str] = "rlpretrain.rollouts.factories:make_vllm_local"
    in_process: ClassVar[bool] = True
    takes_adapters: ClassVar[bool] = True

    sleep: bool = False
    """Let vLLM give its device memory back while the model trains (GPU)."""

    @property
    def sleeps(self) -> bool:
        """As `sleep` says."""
        return self.sleep

    @property
    def reserved_gib(self) -> float | None:
        """vLLM's cache."""
        return self.kv_cache_gib

    def own_weights(self, sharded: bool) -> str:
        """vLLM always has its own."""
        return "vLLM's"

    def libraries(self) -> tuple[str, ...]:
        """vLLM."""
        return ("vllm",)

    def memory_notes(self) -> list[str]:
        """The cache, where vLLM decides how large it is."""
        if self.kv_cache_gib is not None:
            return []
        return [
            f"engine.kv_cache_gib: null lets vLLM fill {self.gpu_memory_utilization:.0%} of the device, its "
            "weights included"
        ]


@dataclass(config=STRICT, kw_only=True)
class RayConfig(VLLMConfig):
    """Engines as Ray actors."""

    factory: ClassVar[str] = "rlpretrain.rollouts.factories:make_ray"

    num_engines: Count = 1
    """Actors of engine ray."""
    of: Literal["hf", "vllm_local"] = "vllm_local"
    """What runs in each of them."""
    resources: dict[str, float] = _field(default_factory=dict)
    """What each of them takes: num_cpus (1 by default), num_gpus."""
    strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    """How Ray places them over machines."""
    address: str | None = None
    """Ray cluster to join (auto, or host:port); a local one is started by default."""
    request_timeout: Seconds = 600.0
    """Seconds to wait for one answer of a server or actor; one that takes longer counts as hung."""
    deadline: Seconds = 600.0
    """Seconds without any server that works after which a run stops."""

    def libraries(self) -> tuple[str, ...]:
        """Ray, and vLLM where the actors run it."""
        return ("vllm", "ray") if self.of == "vllm_local" else ("ray",)

    def addresses(self) -> list[tuple[str, str]]:
        """The cluster's head, if it is given by its address."""
        if not self.address or ":" not in self.address:
            return []
        return [("engine.address", self.address if "//" in self.address else f"ray://{self.address}")]


@dataclass(config=STRICT, kw_only=True)
class ServerConfig(EngineConfig):
    """What engines share that sample on servers over HTTP."""

    urls: tuple[str, ...] = ()
    """The servers, as http://host:port."""
    weights_dir: PathText | None = None
    """Folder, shared with the servers, that weights pass through; output_dir/weights by default."""
    token_file: PathText | None = None
    """File with the servers' API key."""
    concurrency: Count = 64
    """Most prompts in flight at a server."""
    request_timeout: Seconds = 600.0
    """Seconds to wait for one answer of a server or actor; one that takes longer counts as hung."""
    deadline: Seconds = 600.0
    """Seconds without any server that works after which a run stops."""

    @property
    def writes_weights(self) -> bool:
        """Into weights_dir."""
        return True

    def libraries(self) -> tuple[str, ...]:
        """HTTP clients."""
        return ("httpx", "aiohttp")

    def addresses(self) -> list[tuple[str, str]]:
        """All servers."""
        return [("engine.urls", url) for url in self.urls]

    def files(self) -> dict[str, str | None]:
        """The token's."""
        return {"engine.token_file": self.token_file}


@dataclass(config=STRICT, kw_only=True)
class VLLMServerConfig(ServerConfig):
    """vLLM servers, or `rlpretrain serve`."""

    factory: ClassVar[str] = "rlpretrain.rollouts.factories:make_vllm_server"

    block_size: Count | None = None
    """Tokens per block of the servers' prefix cache; 128, the largest they choose themselves, by default."""
    updates: Literal["drained", "in_flight"] = "drained"
    """Whether new weights wait for the thoughts that are being sampled, or reach them: thoughts then go on
    with the new weights (vLLM's own server).
    """
    transfer: Literal["file", "changes", "nccl"] = "file"
    """How weights reach the servers. file: whole, through weights_dir. changes: only the numbers that changed
    since the last sync, likewise, to `rlpretrain serve`. nccl: from GPU to GPU (servers started with
    --weight-transfer-config).
    """
    master_address: str | None = None
    """With nccl, the address at which the servers reach the trainer; this machine's name by default."""

    @property
    def writes_weights(self) -> bool:
        """Unless they go from GPU to GPU."""
        return self.transfer != "nccl"


@dataclass(config=STRICT, kw_only=True)
class SGLangServerConfig(ServerConfig):
    """SGLang servers."""

    factory: ClassVar[str] = "rlpretrain.rollouts.factories:make_sglang_server"

    deterministic: bool = True
    """Refuse servers that were started without --enable-deterministic-inference: they ignore seeds, so the
    same run draws other thoughts each time.
    """


@dataclass(config=STRICT, kw_only=True)
class CustomConfig(EngineConfig):
    """An engine outside this package; `name` is package.module:Class."""

    options: dict[str, Any] = _field(default_factory=dict)
    """Its own settings."""


CUSTOM = "package.module:Class"
BUILT_IN: dict[str, type[EngineConfig]] = {
    "hf": HFConfig,
    "vllm_local": VLLMLocalConfig,
    "vllm_server": VLLMServerConfig,
    "sglang_server": SGLangServerConfig,
    "ray": RayConfig,
}
EngineSection = Annotated[
    EngineConfig,
    BeforeValidator(lambda value: EngineConfig(**value) if isinstance(value, Mapping) else value),
    headed("name"),
]
"""The type of a field that holds an engine section."""


def own_settings(values: Mapping[str, Any], kind: type[EngineConfig] | None = None) -> dict[str, Any]:
    """`values` of an `engine` section without the settings of other engines.

    Older versions wrote the settings of all engines into run.json and checkpoints. Unknown names stay.
    """
    own = _names(kind or EngineConfig.variant(values))
    others = {name for variant in EngineConfig.variants().values() for name in _names(variant)}
    return {key: value for key, value in values.items() if key in own or key not in others}


def _names(kind: type) -> set[str]:
    """The settings of one engine."""
    return {field.name for field in fields(kind)}


def _owners(name: str) -> list[str]:
    """The engines that have a setting."""
    return [engine for engine, kind in EngineConfig.variants().items() if name in _names(kind)]


def _defaults(name: str) -> list[Any]:
    """The defaults of a setting, in each engine that has it."""
    kinds = EngineConfig.variants().values()
    same = [field for kind in kinds for field in fields(kind) if field.name == name]
    return [f.default if f.default_factory is MISSING else f.default_factory() for f in same]


def _unknown(name: str, cls: type) -> str:
    """Why a name is not that of the engine of `cls`."""
    if cls is not EngineConfig:
        return f"{cls.__name__} belongs to another engine"
    near = difflib.get_close_matches(name, BUILT_IN, n=1)
    if near:
        return f"no such engine; did you mean '{near[0]}'?"
    return f"no such engine; there are {', '.join(BUILT_IN)}, or {CUSTOM}"


def _plain(value: Any) -> Any:
    """A list that JSON or YAML made of a tuple, as the tuple again."""
    return tuple(value) if isinstance(value, list) else value


def _refusal(problems: Mapping[str, str], values: Mapping[str, Any]) -> ValidationError:
    """An error with a message for each of some settings."""
    details = [
        InitErrorDetails(
            type=PydanticCustomError("engine", "{text}", {"text": text}), loc=(key,), input=values.get(key)
        )
        for key, text in problems.items()
    ]
    return ValidationError.from_exception_data("engine", details)
