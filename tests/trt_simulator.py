"""A simulator of TensorRT's runtime API over ONNX Runtime on the CPU and a simulated GPU, for tests without a GPU.

It has the classes and enums that `kandrt.engines` uses, and enforces the rules of the real ones (their docstrings, the
headers, and what the library was seen to do): a shape outside the profile, an address that was never set or whose
memory is too small, missing or too small activation memory, the default stream, plans of another version or GPU, a
context in two threads, a replayed graph whose context, shapes or memory are no longer those it was captured with. As
the library does, it refuses by False or None and says why to the logger.
"""

from __future__ import annotations

import enum
import functools
import json
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime

from kandrt.engines.bundle import Bundle
from kandrt.engines.manifest import FileRecord
from kandrt.engines.plans import Builder, PlanFigures, PlanRecord, PlanSettings, plan_key
from kandrt.engines.profiles import Profile
from kandrt.engines.trt import Messages
from kandrt.engines.trt_engine import Library

from .gpu_simulator import ALIGNMENT, DEFAULT, Block, Gpu

MAGIC = b"simulated plan\n"
VERSION, CAPABILITY = "1.0", "sm89"

DataType = enum.Enum("DataType", "FLOAT HALF BF16 INT32 INT64 BOOL")
TensorIOMode = enum.Enum("TensorIOMode", "NONE INPUT OUTPUT")
Strategy = enum.Enum("ExecutionContextAllocationStrategy", "STATIC ON_PROFILE_CHANGE USER_MANAGED")
EngineStat = enum.Enum("EngineStat", "TOTAL_WEIGHTS_SIZE STRIPPED_WEIGHTS_SIZE")
Severity = enum.Enum("Severity", "INTERNAL_ERROR ERROR WARNING INFO VERBOSE")
CudaGraphStrategy = enum.Enum("CudaGraphStrategy", "DISABLED WHOLE_GRAPH_CAPTURE")
Specialization = enum.Enum("DynamicShapesKernelSpecializationStrategy", "LAZY EAGER NONE")
Diagnostics = enum.IntEnum("EngineInvalidityDiagnostics", {"VERSION_MISMATCH": 1, "UNSUPPORTED_CC": 2, "MALFORMED": 32})
DTYPES = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16", "int32": "INT32", "int64": "INT64", "bool": "BOOL"}


# Plans


def make_plan(
    bundle: Bundle,
    component: str,
    profiles: Sequence[Profile] = (),
    *,
    builder: Builder = "tensorrt",
    version: str = VERSION,
    capability: str = CAPABILITY,
    weights: int = 2**20,
    streamable: int = 0,
    capturable: bool = True,
    stripped: bool = False,
) -> tuple[PlanRecord, bytes]:
    """A plan that the simulator runs, and its record; streamable: bytes of weights that need not be on the device."""
    manifest = bundle.manifest.components[component]
    tensors = {
        spec.name: {
            "mode": mode,
            "dtype": DTYPES[spec.dtype],
            "shape": [axis if isinstance(axis, int) else -1 for axis in spec.shape],
            "profiles": [profile.shapes(spec) for profile in profiles] if mode == "INPUT" else [],
        }
        for specs, mode in ((manifest.inputs, "INPUT"), (manifest.outputs, "OUTPUT"))
        for spec in specs
    }
    plan = MAGIC + json.dumps(
        {
            "version": version, "capability": capability, "graph": str(bundle.path(manifest.graph)), "tensors": tensors,
            "profiles": max(len(profiles), 1), "weights": weights, "streamable": streamable, "capturable": capturable,
            "stripped": stripped,
        }
    ).encode()  # fmt: skip
    key = plan_key(
        bundle,
        component,
        builder=builder,
        library=version,
        compute_capabilities=[capability],
        profiles=profiles,
        settings=PlanSettings((*["WEIGHT_STREAMING"] * bool(streamable), *["STRIP_PLAN"] * stripped)),  # type: ignore[arg-type]
    )
    file = FileRecord(key.stem + ".plan", len(plan), sha256(plan).hexdigest())
    return PlanRecord(1, key, file, PlanFigures(1, 0.1, 0.0, 1)), plan


# The library


class Logger:
    """What the real one is: it hears of every refusal."""

    def __init__(self) -> None:
        self.messages = Messages()

    def error(self, text: str) -> None:
        self.messages.add("ERROR", text)


def simulated(gpu: Gpu, builder: Builder = "tensorrt") -> Library:
    """TensorRT or TensorRT-RTX on a simulated GPU."""
    module = SimpleNamespace(
        __version__=VERSION,
        TensorIOMode=TensorIOMode,
        ExecutionContextAllocationStrategy=Strategy,
        EngineStat=EngineStat,
        Runtime=lambda logger: Runtime(gpu, logger, builder),
        Refitter=Refitter,
        OnnxParserRefitter=OnnxParserRefitter,
    )
    if builder == "tensorrt-rtx":
        module.CudaGraphStrategy = CudaGraphStrategy
        module.DynamicShapesKernelSpecializationStrategy = Specialization
        module.EngineInvalidityDiagnostics = Diagnostics
    logger = Logger()
    return Library(builder, module, logger, logger.messages)


class Runtime:
    def __init__(self, gpu: Gpu, logger: Logger, builder: Builder) -> None:
        self.gpu, self.logger, self.builder = gpu, logger, builder
        if builder == "tensorrt-rtx":
            self.get_engine_validity = lambda plan: ("INVALID", self._diagnose(plan)[0])

    def _diagnose(self, plan: bytes) -> tuple[int, str]:
        if not plan.startswith(MAGIC):
            return Diagnostics.MALFORMED, "Serialization assertion header.magicTag failed"
        facts = json.loads(plan.removeprefix(MAGIC))
        if facts["version"] != VERSION:
            return Diagnostics.VERSION_MISMATCH, f"The engine plan file is not compatible with version {VERSION}"
        if facts["capability"] != CAPABILITY:
            return Diagnostics.UNSUPPORTED_CC, f"The engine was built for compute capability {facts['capability']}"
        return 0, ""

    def deserialize_cuda_engine(self, plan: bytes) -> Engine | None:
        bits, why = self._diagnose(plan)
        if bits:
            self.logger.error(f"IRuntime::deserializeCudaEngine: Error Code 1: {why}")
            return None
        try:
            return Engine(self.gpu, self.logger, self.builder, json.loads(plan.removeprefix(MAGIC)))
        except MemoryError as error:
            self.logger.error(f"Error Code 2: OutOfMemory (Requested size was {error})")
            return None


class Refitter:
    """Fills engines that were built without weights."""

    def __init__(self, engine: Engine, logger: Logger) -> None:
        self.engine, self.logger, self.found = engine, logger, False

    def get_missing_weights(self) -> list[str]:
        return [] if self.found else ["all"]

    def refit_cuda_engine(self) -> bool:
        self.engine.facts["stripped"] = not self.found
        return self.found


class OnnxParserRefitter:
    def __init__(self, refitter: Refitter, logger: Logger) -> None:
        self.refitter = refitter

    def refit_from_file(self, model: str) -> bool:
        self.refitter.found = model == self.refitter.engine.facts["graph"]
        if not self.refitter.found:
            self.refitter.logger.error(f"cannot read {model}")
        return self.refitter.found


class Engine:
    def __init__(self, gpu: Gpu, logger: Logger, builder: Builder, facts: dict[str, Any]) -> None:
        self.gpu, self.logger, self.builder, self.facts = gpu, logger, builder, facts
        self.tensors: dict[str, dict[str, Any]] = facts["tensors"]
        self.weights = gpu.allocate(facts["weights"])
        self.contexts = 0
        self._budget = facts["streamable"]
        self._inferred: dict[Any, dict[str, tuple[int, ...]]] = {}
        self.session = opened(facts["graph"])
        gpu.counts["engines"] += 1
        weakref.finalize(self, freed, gpu, "engine", self.weights)

    num_io_tensors = property(lambda self: len(self.tensors))
    num_optimization_profiles = property(lambda self: self.facts["profiles"])
    streamable_weights_size = property(lambda self: self.facts["streamable"])
    device_memory_size_v2 = property(lambda self: max(map(self.get_device_memory_size_for_profile_v2, self._profiles)))
    _profiles = property(lambda self: range(self.facts["profiles"]))

    @property
    def weight_streaming_budget_v2(self) -> int:
        return int(self._budget)

    @weight_streaming_budget_v2.setter
    def weight_streaming_budget_v2(self, budget: int) -> None:
        if self.contexts:
            self.logger.error("setWeightStreamingBudgetV2: contexts exist")
        else:
            self._budget = budget

    def get_weight_streaming_automatic_budget(self) -> int:
        return int(self.facts["streamable"] // 2)

    def get_engine_stat(self, stat: Any) -> int:
        return int(self.facts["weights"]) if stat is EngineStat.TOTAL_WEIGHTS_SIZE else -1

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_mode(self, name: str) -> Any:
        return TensorIOMode[self.tensors[name]["mode"]]

    def get_tensor_dtype(self, name: str) -> Any:
        return DataType[self.tensors[name]["dtype"]]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        """Where a profile leaves one length only, it is that, as was seen of the real library."""
        tensor = self.tensors[name]
        ranges = tensor["profiles"]
        if len(ranges) == 1 and ranges[0][0] == ranges[0][2]:
            return tuple(ranges[0][0])
        return tuple(tensor["shape"])

    def get_device_memory_size_for_profile_v2(self, profile: int) -> int:
        shapes = {name: tensor["profiles"][profile][2] if tensor["profiles"] else tensor["shape"]
                  for name, tensor in self.tensors.items() if tensor["mode"] == "INPUT"}  # fmt: skip
        return activations(shapes)

    def output_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """The real library infers them; here one run on zeros shows them."""
        key = tuple(sorted(shapes.items()))
        if key not in self._inferred:
            types = {"FLOAT": np.float32, "INT64": np.int64}
            zeros = {name: np.zeros(shape, types[self.tensors[name]["dtype"]]) for name, shape in shapes.items()}
            names = [value.name for value in self.session.get_outputs()]
            results = self.session.run(names, zeros)
            self._inferred[key] = {name: result.shape for name, result in zip(names, results, strict=True)}
        return self._inferred[key]

    def create_runtime_config(self) -> RuntimeConfig:
        return RuntimeConfig(self.gpu)

    def create_execution_context(self, config: Any) -> Context:
        self.contexts += 1
        self.gpu.counts["contexts"] += 1
        if not isinstance(config, RuntimeConfig):
            config = RuntimeConfig(self.gpu, config)
        return Context(self, config)


@functools.lru_cache(32)
def opened(graph: str) -> Any:
    """What computes; opening it is most of a test's time."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def freed(gpu: Gpu, what: str, address: int | None = None) -> None:
    if address is not None:
        gpu.used -= gpu.blocks.pop(address).size
    gpu.freed.append(what)


def activations(shapes: Mapping[str, Sequence[int]]) -> int:
    """Of any sizes that grow with the shapes."""
    return 1024 + sum(int(np.prod(shape)) for shape in shapes.values())


class RuntimeConfig:
    def __init__(self, gpu: Gpu, strategy: Any = Strategy.STATIC) -> None:
        self.gpu, self.strategy, self.cache = gpu, strategy, None
        self.cuda_graph_strategy = CudaGraphStrategy.DISABLED
        self.dynamic_shapes_kernel_specialization_strategy = Specialization.LAZY

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> RuntimeCache:
        return RuntimeCache()

    def set_runtime_cache(self, cache: RuntimeCache) -> bool:
        self.cache = cache
        return True


class RuntimeCache:
    """Kernels by graph and shape."""

    def __init__(self) -> None:
        self.kernels: set[str] = set()

    def deserialize(self, blob: bytes) -> bool:
        self.kernels = set(json.loads(blob))
        return True

    def serialize(self) -> bytes:
        return json.dumps(sorted(self.kernels)).encode()


@dataclass(frozen=True)
class State:
    """What a run depends on, and a graph holds."""

    shapes: dict[str, tuple[int, ...]]
    addresses: dict[str, int]
    memory: tuple[int, int] | None


class Context:
    def __init__(self, engine: Engine, config: RuntimeConfig) -> None:
        if config.strategy is not Strategy.USER_MANAGED:
            raise AssertionError("kandrt brings its own activation memory")
        self.engine, self.config, self.gpu = engine, config, engine.gpu
        self.profile: int | None = None
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.memory: tuple[int, int] | None = None
        self.sized: dict[str, tuple[int, ...]] | None = None  # the shapes that memory was asked for
        self.captured: State | None = None
        self.busy = threading.Lock()
        weakref.finalize(self, self._gone, weakref.ref(engine), engine.gpu)
        if engine.builder == "tensorrt-rtx":
            self.is_stream_capturable = lambda stream: bool(stream) and engine.facts["capturable"]

    @staticmethod
    def _gone(engine: Any, gpu: Gpu) -> None:
        if engine() is not None:
            engine().contexts -= 1
        gpu.freed.append("context" if gpu.idle() else "context in use")

    def _refuse(self, why: str) -> bool:
        self.engine.logger.error(f"IExecutionContext: Error Code 3: API Usage Error ({why})")
        return False

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        if not 0 <= profile < self.engine.num_optimization_profiles:
            return self._refuse(f"no profile {profile}")
        self.profile, self.shapes = profile, {}
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.gpu.counts["shape changes"] += 1
        tensor = self.engine.tensors[name]
        if self.profile is None:
            return self._refuse("no profile was set")
        if tensor["profiles"]:
            least, _, greatest = tensor["profiles"][self.profile]
        else:
            least = greatest = tensor["shape"]
        inside = len(shape) == len(least) and all(a <= b <= c for a, b, c in zip(least, shape, greatest, strict=True))
        if not inside:
            return self._refuse(f"Set dimension {list(shape)} for tensor {name} does not satisfy any profile")
        self.shapes[name], self.sized = tuple(shape), None
        return True

    def infer_shapes(self) -> list[str]:
        inputs = [name for name, tensor in self.engine.tensors.items() if tensor["mode"] == "INPUT"]
        return [name for name in inputs if name not in self.shapes]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if name in self.shapes:
            return self.shapes[name]
        return tuple(self._output_shapes()[name])

    def _output_shapes(self) -> dict[str, tuple[int, ...]]:
        return self.engine.output_shapes(self.shapes)

    def update_device_memory_size_for_shapes(self) -> int:
        if self.infer_shapes():
            return 0
        self.sized, self.memory = dict(self.shapes), None  # nothing says that the memory set before stays in use
        return activations(self.shapes)

    def set_device_memory(self, memory: int, size: int) -> None:
        self.gpu.counts["memory changes"] += 1
        if memory % ALIGNMENT or not memory or size < self._needed():
            self._refuse("condition: memory != nullptr || expectedSize == 0")
        else:
            self.memory = (memory, size)

    def _needed(self) -> int:
        if self.sized == self.shapes:
            return activations(self.shapes)
        return self.engine.get_device_memory_size_for_profile_v2(self.profile or 0)

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self.gpu.counts["address changes"] += 1
        if name not in self.engine.tensors or memory % ALIGNMENT % 4:
            return self._refuse(f"bad address {memory} for {name}")
        self.addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        if not self.busy.acquire(blocking=False):
            raise AssertionError("one context in two threads")
        try:
            return self._execute(stream_handle)
        finally:
            self.busy.release()

    def _execute(self, stream: int) -> bool:
        if stream == DEFAULT:
            return self._refuse("Using default stream in enqueueV3() may lead to performance issues")
        missing = self.infer_shapes() + [name for name in self.engine.tensors if name not in self.addresses]
        if missing:
            return self._refuse(f"Address or shape is not set for {', '.join(missing)}")
        if self.memory is None or self.memory[1] < self._needed():
            return self._refuse("condition: noDeviceMemory")
        if self.engine.facts["stripped"]:
            return self._refuse("the engine has no weights: refit it first")
        state = State(dict(self.shapes), dict(self.addresses), self.memory)
        if self.gpu.capturing(stream):
            if not self.engine.facts["capturable"]:
                return self._refuse("operation not permitted when stream is capturing")
            assert self.gpu.nodes is not None
            self.gpu.nodes.append(lambda launched: self._replay(state, launched))
            return True
        if self.config.cuda_graph_strategy is CudaGraphStrategy.WHOLE_GRAPH_CAPTURE:
            self.gpu.counts["library replays" if self.captured == state else "library captures"] += 1
            self.captured = state
        if (
            self.config.cache is not None
            and f"{self.engine.facts['graph']} {state.shapes}" not in self.config.cache.kernels
        ):
            self.gpu.counts["compiled"] += 1
            self.config.cache.kernels.add(f"{self.engine.facts['graph']} {state.shapes}")
        self.gpu.counts["runs"] += 1
        self._compute(state, stream)
        return True

    def _replay(self, state: State, stream: int) -> None:
        if state.shapes != self.shapes or state.memory != self.memory:
            raise AssertionError("a graph is replayed whose context has other shapes or memory by now")
        self._compute(state, stream)

    def _compute(self, state: State, stream: int) -> None:
        """What the kernels do: read inputs and write outputs and activations, at the addresses of the state."""
        assert state.memory is not None
        shapes = state.shapes | self._output_shapes()
        views: dict[str, Any] = {}
        blocks: dict[str, Block] = {}
        types = {
            value.name: value.type for value in [*self.engine.session.get_inputs(), *self.engine.session.get_outputs()]
        }
        for name, shape in shapes.items():
            dtype = np.dtype({"tensor(float)": "f4", "tensor(int64)": "i8"}[types[name]])
            blocks[name], data = self.gpu.at(state.addresses[name], int(np.prod(shape)) * dtype.itemsize)
            views[name] = data.view(dtype).reshape(shape)
        scratch, _ = self.gpu.at(*state.memory)
        written = [blocks[value.name] for value in self.engine.session.get_outputs()]
        self.gpu.work(stream, [blocks[name] for name in state.shapes], [*written, scratch])
        names = [value.name for value in self.engine.session.get_outputs()]
        results = self.engine.session.run(names, {name: views[name].copy() for name in state.shapes})
        for name, result in zip(names, results, strict=True):
            if tuple(result.shape) != shapes[name]:
                raise AssertionError(f"{name}: inferred {shapes[name]}, computed {result.shape}")
            views[name][...] = result
