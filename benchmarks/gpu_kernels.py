"""FlexAttention's kernels for the tree mask, compiled for a GPU on a machine without one.

    pip install --no-deps --target FOLDER triton
    PYTHONPATH=FOLDER python -m benchmarks.gpu_kernels [--cards H100 A100] [--json]

The tree's attention is traced on a CPU, with gradient and with dynamic sizes. Its graphs are then lowered as
if their tensors were on the card: torch's compiler asks for the properties of the device, and gets those of
`CARDS`. Triton compiles the kernels that come out to machine code. So this shows that torch can lower the
mask, that kernels compile, and that their shared memory fits; it runs nothing, and says nothing about speed.
Private names of torch are replaced, so it may break with another version of torch than 2.13.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch


@dataclass(frozen=True)
class Card:
    """The properties of a device that torch's compiler reads."""

    name: str
    capability: tuple[int, int]
    processors: int
    shared: int
    """The most shared memory of a block, in bytes."""

    def properties(self) -> Any:
        """As `torch.cuda.get_device_properties`."""
        return SimpleNamespace(
            name=self.name,
            major=self.capability[0],
            minor=self.capability[1],
            total_memory=80 << 30,
            multi_processor_count=self.processors,
            regs_per_multiprocessor=65536,
            max_threads_per_multi_processor=2048,
            max_threads_per_block=1024,
            warp_size=32,
            shared_memory_per_block=49152,
            shared_memory_per_block_optin=self.shared,
            shared_memory_per_multiprocessor=self.shared + 1024,
            L2_cache_size=50 << 20,
            uuid="none",
        )


CARDS = {
    "H100": Card("NVIDIA H100 80GB HBM3", (9, 0), 132, 232448),
    "A100": Card("NVIDIA A100-SXM4-80GB", (8, 0), 108, 166912),
}
CASES: dict[str, dict[str, Any]] = {
    "Qwen3 (16 and 8 heads of 128), bfloat16": {"dtype": "bfloat16", "width": 128},
    "the same in float32": {"dtype": "float32", "width": 128},
    "16 heads of 64, a window, bfloat16": {"width": 64, "dtype": "bfloat16", "keys": 16, "window": 512},
    "16 and 8 heads of 64, a window and a soft cap, bfloat16": {
        "dtype": "bfloat16",
        "width": 64,
        "window": 512,
        "softcap": 50.0,
    },
}


@contextmanager
def replaced(owner: Any, functions: dict[str, Callable[..., Any]], static: bool = False) -> Iterator[None]:
    """Functions of a module or class, replaced in the context."""
    with ExitStack() as stack:
        for name, function in functions.items():
            value = staticmethod(function) if static else function
            stack.enter_context(mock.patch.object(owner, name, value, create=static))
        yield


@contextmanager
def compiling_for(card: Card) -> Iterator[None]:
    """Triton, and torch's interface to it, see the card; whole processes do, since torch asks only once."""
    import triton
    from torch._dynamo import device_interface
    from triton.backends.compiler import GPUTarget

    properties, capability = card.properties(), 10 * card.capability[0] + card.capability[1]
    driver = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
        get_current_device=lambda: 0,
        get_device_capability=lambda device=0: card.capability,
        get_active_torch_device=lambda: torch.device("cuda", 0),
    )
    functions: dict[str, Callable[..., Any]] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_compute_capability": lambda device=None: capability,
        "get_device_properties": lambda device=None: properties,
        "get_raw_stream": lambda device: 0,
        "exchange_device": lambda device: 0,
        "maybe_exchange_device": lambda device: 0,
        "is_triton_capable": lambda device=None: True,
        "raise_if_triton_unavailable": lambda device=None: None,
        "is_bf16_supported": lambda *options, **more: True,
    }
    of_worker = {name: functions[name] for name in ("get_device_properties", "current_device")}
    interface: Any = device_interface.CudaInterface
    triton.runtime.driver.set_active(driver)
    with replaced(interface, functions, static=True), replaced(interface.Worker, of_worker, static=True):
        for name in ("cuda", "cuda:0"):
            device_interface.register_interface_for_device(name, interface)
        yield


@contextmanager
def lowering_for(card: Card) -> Iterator[None]:
    """`torch.cuda` describes the card."""
    functions: dict[str, Callable[..., Any]] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_current_stream_capturing": lambda: False,
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "_is_compiled": lambda: True,
        "_exchange_device": lambda device: 0,
        "_maybe_exchange_device": lambda device: 0,
        "synchronize": lambda *device: None,
        "get_device_properties": lambda device=None: card.properties(),
        "get_device_capability": lambda device=None: card.capability,
        "get_device_name": lambda device=None: card.name,
        "get_rng_state": lambda *device: torch.zeros(8),
        "set_rng_state": lambda *state: None,
        "current_stream": lambda *device: SimpleNamespace(cuda_stream=0),
    }
    with mock.patch.object(torch.version, "cuda", "13.0"), replaced(torch.cuda, functions):
        yield


def lowered(card: Card, case: dict[str, Any]) -> list[str]:
    """The code that torch makes of the tree's attention: with gradient, forward and backward."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import make_boxed_func
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.graph import GraphLowering
    from torch.nn.attention import flex_attention as library

    from rlpretrain.scoring.attention import flex
    from rlpretrain.tree import grow

    codes: list[str] = []

    def keep_code(graph: Any) -> Any:
        codes.append(graph.codegen()[0].value)
        raise Lowered

    def stop(*inputs: Any) -> Any:
        raise Lowered  # running the backward on a CPU takes minutes and shows nothing here

    def compiler(backward: bool) -> Any:
        def compile_graph(graph: Any, inputs: Any) -> Any:
            on_card = move_graph(copy.deepcopy(graph))
            before = len(codes)
            with torch.no_grad(), lowering_for(card):
                try:
                    compile_fx_inner(on_card, [move(x) for x in inputs], is_backward=backward)
                except Exception:  # torch raises an error of its own from `Lowered`
                    if len(codes) == before:
                        raise
            return make_boxed_func(stop if backward else graph.forward)

        return compile_graph

    backend = aot_autograd(
        fw_compiler=compiler(False),
        bw_compiler=compiler(True),
        decompositions=select_decomp_table(),
        partition_fn=min_cut_rematerialization_partition,
    )
    function = torch.compile(flex._attend, dynamic=False, fullgraph=True, backend=backend)
    operator: Any = sys.modules["torch._higher_order_ops.flex_attention"]
    with (
        mock.patch.object(flex, "compiled", lambda: function),
        mock.patch.object(library, "_validate_device", lambda *tensors: None),
        mock.patch.object(GraphLowering, "_compile_to_module", keep_code),
        mock.patch.object(operator, "_permute_strides", lambda out, strides: out.contiguous()),
    ):
        width, dtype, tree = case["width"], getattr(torch, case["dtype"]), grow([list(range(700))]).tree
        heads = (16, case.get("keys", 8), case.get("keys", 8))
        q, k, v = (torch.randn(1, n, tree.size, width, dtype=dtype, requires_grad=True) for n in heads)
        out = flex.flex(q, k, v, tree, width**-0.5, case.get("window"), case.get("softcap"))
        with suppress(Lowered):
            out.sum().backward()
    return codes


class Lowered(Exception):
    """The code is known; what follows would need the device."""


def move(value: Any) -> Any:
    """A fake tensor, or the name of a device, on the card."""
    from torch._subclasses.fake_tensor import FakeTensor

    if isinstance(value, FakeTensor):
        with value.fake_mode:
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda:0")
    return torch.device("cuda", 0) if isinstance(value, torch.device) else value


def move_graph(graph: Any) -> Any:
    """A graph with all that it says of its tensors on the card; changes the graph."""
    from torch.utils._pytree import tree_map

    for module in graph.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                node.args, node.kwargs = tree_map(move, node.args), tree_map(move, node.kwargs)
                for name in {"val", "example_value"} & node.meta.keys():
                    node.meta[name] = tree_map(move, node.meta[name])
            module.recompile()
    return graph


def compile_kernels(card: Card, code: str) -> list[dict[str, Any]]:
    """The attention kernels of torch's code as machine code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    target = GPUTarget("cuda", 10 * card.capability[0] + card.capability[1], 32)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    rows = []
    for name, text in re.findall(
        r"async_compile\.triton\('(triton_tem_\w+)', '''\n(.*?)''', device_str", code, re.S
    ):
        source = re.sub(
            r"@triton_heuristics\.template\(.*?\n\)\n@triton\.jit", "@triton.jit", text, flags=re.S
        )
        source = re.sub(r"^triton_helpers\.set_driver.*$", "", source, flags=re.M)
        signature = eval(re.search(r"'signature': (\{.*?\})", text)[1])
        options = {key: int(re.search(rf"{key}=(\d+)", text)[1]) for key in ("num_stages", "num_warps")}
        aligned = {
            (i,): [["tt.divisibility", 16]]
            for i, kind in enumerate(signature.values())
            if kind.startswith("*")
        }
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / f"{name}.py"
            file.write_text(source)
            spec: Any = importlib.util.spec_from_file_location(name, file)
            module: Any = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            asked = ASTSource(fn=getattr(module, name), signature=signature, constexprs={}, attrs=aligned)
            kernel = triton.compile(asked, target=target, options=options)
            binary = Path(folder) / "kernel.cubin"
            binary.write_bytes(kernel.asm["cubin"])
            usage = subprocess.run(
                [tool, "-res-usage", binary], capture_output=True, text=True, check=True
            ).stdout
        rows.append(
            {
                "kernel": "backward" if "backward" in name else "forward",
                "shared": kernel.metadata.shared,
                "limit": card.shared,
                "registers": int(re.search(r"REG:(\d+)", usage)[1]),
                "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
                "whole_blocks": "IS_DIVISIBLE : tl.constexpr = True" in text,
            }
        )
    return rows


def measure(card: str, name: str) -> list[dict[str, Any]]:
    """The kernels of one case on one card."""
    torch._inductor.config.force_disable_caches = True
    with compiling_for(CARDS[card]):
        codes = lowered(CARDS[card], CASES[name])
        rows = [row for code in codes for row in compile_kernels(CARDS[card], code)]
    if {row["kernel"] for row in rows} != {"forward", "backward"}:
        raise SystemExit(f"{card}, {name}: torch made {len(rows)} kernels, not a forward and a backward")
    return [{"card": card, "case": name, **row} for row in rows]


def main(argv: Sequence[str] | None = None) -> None:
    """Compile and print."""
    parser = argparse.ArgumentParser(
        description="FlexAttention's kernels for the tree mask, compiled without a GPU."
    )
    parser.add_argument("--cards", nargs="+", choices=CARDS, default=["H100"])
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if importlib.util.find_spec("triton") is None:
        raise SystemExit(
            "triton is not installed: pip install --no-deps --target FOLDER triton; PYTHONPATH=FOLDER"
        )
    if options.one:
        return print(json.dumps(measure(*json.loads(options.one))))
    import triton

    rows: list[dict[str, Any]] = []
    for task in [(card, case) for card in options.cards for case in CASES]:
        command = [sys.executable, "-m", "benchmarks.gpu_kernels", "--one", json.dumps(task)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise SystemExit(f"{task}: failed")
        rows += json.loads(done.stdout.splitlines()[-1])
        print(*rows[-2:], sep="\n", file=sys.stderr, flush=True)
    report = {
        "benchmark": "gpu_kernels",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "rows": rows,
    }
    print(json.dumps(report, indent=None if options.json else 1))


if __name__ == "__main__":
    main()
