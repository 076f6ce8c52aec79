"""A deserialised plan of TensorRT or TensorRT-RTX: its tensors checked, its weights' budget set, its contexts made."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from .cuda import Device
from .errors import BackendError, BundleError, InputError, OutputError
from .files import atomic_write
from .plans import Builder, PlanRecord
from .spec import DType, TensorSpec
from .trt import Messages

# TensorRT's names of the types of tensors
DTYPES: Mapping[str, DType] = {
    "BOOL": "bool",
    "INT32": "int32",
    "INT64": "int64",
    "HALF": "float16",
    "BF16": "bfloat16",
    "FLOAT": "float32",
}
# Who captures CUDA graphs: TensorRT-RTX itself, because it swaps kernels while it runs; TensorRT leaves it to us.
Graphs = Literal["none", "ours", "library"]


@dataclass(frozen=True)
class Library:
    """TensorRT or TensorRT-RTX with its logger and the one runtime that engines are made by."""

    builder: Builder
    module: Any
    logger: Any
    messages: Messages
    runtime: Any = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "runtime", self.module.Runtime(self.logger))

    @property
    def captures(self) -> bool:
        """Whether the library captures CUDA graphs by itself, and compiles when it runs."""
        return hasattr(self.module, "CudaGraphStrategy")


@dataclass(frozen=True)
class Settings:
    """How engines run.

    cuda_graph: True asks for graphs, False for none, None captures what has fixed shapes. budget: bytes of streamable
    weights that stay on the device, None what the library finds best for the memory that is free. cache: where kernels
    that TensorRT-RTX compiles are kept, None nowhere.
    """

    cuda_graph: bool | None = None
    budget: int | None = None
    cache: Path | None = None


@dataclass(frozen=True)
class Plans:
    """The plans of one component that can be used here.

    read gives a plan's bytes, their hash checked: opening them runs what they hold. graph gives the ONNX file, its hash
    and its weights' checked, from which plans that were built without weights are filled. build is the command that
    builds a plan for axes of these lengths.
    """

    records: Sequence[PlanRecord]
    read: Callable[[PlanRecord], bytes]
    graph: Callable[[], Path]
    build: Callable[[Mapping[str, int]], str]


class Engine:
    """A plan in memory."""

    def __init__(
        self,
        name: str,
        record: PlanRecord,
        plans: Plans,
        specs: tuple[Sequence[TensorSpec], Sequence[TensorSpec]],
        library: Library,
        device: Device,
        settings: Settings,
    ) -> None:
        """Open the plan of `record`.

        Raises BackendError where the library refuses the plan, BundleError where it has other tensors than `specs`,
        inputs and outputs, say, InputError for settings that the plan cannot follow.
        """
        self.name, self.record, self._device, self._library = name, record, device, library
        self._settings = settings
        plan = plans.read(record)
        library.messages.clear()
        device.trim()
        self._engine: Any = library.runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise self.failure(f"cannot open {record.plan.file}{self._diagnosis(plan)}", record.plan.size)
        del plan
        self._check_tensors(*specs)
        if "STRIP_PLAN" in record.key.settings.flags:
            self._fill(plans.graph())
        self._set_budget()
        # A file for each plan: several may be open, and each writes all that it has compiled
        own = settings.cache and settings.cache.with_name(f"{Path(record.plan.file).stem}-{settings.cache.name}")
        self._cache = JitCache(own) if library.captures else None

    @property
    def streams_weights(self) -> bool:
        """Whether its weights may stay in the host's memory, which rules CUDA graphs out."""
        return bool(self._engine.streamable_weights_size > 0)

    def graphs(self, static: bool) -> Graphs:
        """Whether runs of one shape are captured, and by whom; `static` is a profile that holds one shape only."""
        wanted = static if self._settings.cuda_graph is None else self._settings.cuda_graph
        if not wanted or self.streams_weights:
            return "none"
        return "library" if self._library.captures else "ours"

    @property
    def graphs_asked_for(self) -> bool:
        """Whether the user wants graphs, and not only we."""
        return self._settings.cuda_graph is True

    def create_context(self, graphs: Graphs) -> Any:
        """An execution context without activation memory."""
        trt, strategy = self._library.module, self._library.module.ExecutionContextAllocationStrategy.USER_MANAGED
        self._library.messages.clear()
        if not self._library.captures:
            context = self._engine.create_execution_context(strategy)
        else:
            config = self._engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(strategy)
            if graphs == "library":
                config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            # Not compiled in the background: then the step at which kernels are swapped, and so the last bits of a
            # picture, would depend on the machine's load
            config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
            if self._cache is not None:
                self._cache.attach(config)
            context = self._engine.create_execution_context(config)
        if context is None:
            raise self.failure("cannot make an execution context", self.activation_bytes())
        return context

    def activation_bytes(self, profile: int | None = None) -> int:
        """What a context needs at most, for one profile or any."""
        if profile is None:
            return int(self._engine.device_memory_size_v2)
        return int(self._engine.get_device_memory_size_for_profile_v2(profile))

    def weights_bytes(self) -> tuple[int, int]:
        """Weights in all, and what of them is on the device."""
        total = int(self._engine.get_engine_stat(self._library.module.EngineStat.TOTAL_WEIGHTS_SIZE))
        streamed = int(self._engine.streamable_weights_size) - int(self._engine.weight_streaming_budget_v2)
        return total, total - max(streamed, 0) if self.streams_weights else total

    def clear_messages(self) -> None:
        """Forget what the library said, before a call whose failure `failure` is to explain."""
        self._library.messages.clear()

    def failure(self, what: str, needed: int) -> BackendError:
        """The error for a call that failed, with the library's own words; `needed` bytes are named if memory lacked."""
        said = self._library.messages.problem()
        if any(sign in said.lower().replace(" ", "") for sign in ("outofmemory", "memoryallocation")):
            return out_of_memory(self.name, f"{what}: {said}", needed, self._device)
        return BackendError(f"{self.name}: {self._library.builder} {what}: {said}")

    def close(self) -> None:
        """Give the weights back, and keep what was compiled; contexts must be gone."""
        if self._cache is not None:
            self._cache.save()
        self._cache = self._engine = None

    def _diagnosis(self, plan: bytes) -> str:
        """What TensorRT-RTX finds wrong with a plan, in brackets."""
        if not hasattr(self._library.runtime, "get_engine_validity"):
            return ""
        _, bits = self._library.runtime.get_engine_validity(plan)
        kinds = self._library.module.EngineInvalidityDiagnostics.__members__
        found = [name.lower().replace("_", " ") for name, kind in kinds.items() if int(bits) & int(kind)]
        return f" ({', '.join(found)})" if found else ""

    def _check_tensors(self, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> None:
        """Raise BundleError unless the plan has these tensors; an axis that a profile fixes may have its length."""
        trt, engine = self._library.module, self._engine
        found = set(map(engine.get_tensor_name, range(engine.num_io_tensors)))
        wanted = {spec.name: (spec, mode) for specs, mode in (
            (inputs, trt.TensorIOMode.INPUT), (outputs, trt.TensorIOMode.OUTPUT)) for spec in specs}  # fmt: skip
        problems = [f"no tensor {name}" for name in wanted.keys() - found]
        problems += [f"a tensor {name} too many" for name in found - wanted.keys()]
        for name in wanted.keys() & found:
            spec, mode = wanted[name]
            shape, dtype = tuple(engine.get_tensor_shape(name)), engine.get_tensor_dtype(name).name
            axes = len(shape) == len(spec.shape) and all(
                length in (-1, axis) or isinstance(axis, str) for length, axis in zip(shape, spec.shape, strict=True)
            )
            if not axes or DTYPES.get(dtype) != spec.dtype or engine.get_tensor_mode(name) != mode:
                problems.append(f"{name} is {DTYPES.get(dtype, dtype)}{list(shape)}, the manifest says {spec}")
        if problems:
            raise BundleError(
                f"{self.name}: {self.record.plan.file} is not a plan of this graph: {'; '.join(sorted(problems))}; "
                f"build it again"
            )

    def _fill(self, graph: Path) -> None:
        """Give a plan that was built without weights those of the graph it was built of."""
        trt, library = self._library.module, self._library
        library.messages.clear()
        refitter = trt.Refitter(self._engine, library.logger)
        parser = trt.OnnxParserRefitter(refitter, library.logger)
        if not parser.refit_from_file(str(graph)) or not refitter.refit_cuda_engine():
            missing = ", ".join(refitter.get_missing_weights()[:5])
            words = f"cannot fill {self.record.plan.file} with weights{' (lacks ' + missing + ')' if missing else ''}"
            raise self.failure(words, self.record.plan.size)

    def _set_budget(self) -> None:
        """Decide how many weights stay on the device, which is before there are contexts."""
        engine, budget = self._engine, self._settings.budget
        if not self.streams_weights:
            if budget is not None:
                warnings.warn(
                    f"{self.name}: weight_streaming_budget does nothing, since its plan was not built with "
                    f"--weight-streaming: all its weights stay on the device",
                    stacklevel=2,
                )
            return
        if self.graphs_asked_for:
            raise InputError(
                f"cuda_graph: {self.name} streams its weights, which no CUDA graph can; "
                f"build it without --weight-streaming, or leave cuda_graph out"
            )
        engine.weight_streaming_budget_v2 = engine.get_weight_streaming_automatic_budget() if budget is None else budget


class JitCache:
    """What TensorRT-RTX compiled for this GPU, kept in a file from one process to the next.

    It holds code, as plans do: the file begins with the SHA-256 of what follows it, and the library checks that it is
    of this version, GPU and driver. Whatever is wrong with it, kernels are compiled again.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._saved = b""
        self._cache: Any = None

    def attach(self, config: Any) -> None:
        """Have contexts that are made by a configuration use the cache."""
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            data = self._read()
            if data and self._cache.deserialize(data):
                self._saved = data
        config.set_runtime_cache(self._cache)

    def save(self) -> None:
        """Write what is new, where the bundle can be written to."""
        if self._cache is None or self._path is None:
            return
        data = bytes(self._cache.serialize())
        if data in (b"", self._saved):
            return
        with suppress(OutputError, OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(self._path) as file:
                file.write(sha256(data).digest() + data)
            self._saved = data

    def _read(self) -> bytes:
        try:
            content = b"" if self._path is None else self._path.read_bytes()
        except OSError:
            return b""
        digest, data = content[:32], content[32:]
        return data if sha256(data).digest() == digest else b""


def out_of_memory(name: str, what: str, needed: int, device: Device) -> BackendError:
    """The error for memory that is not there: what was needed, what is free, and what would lower it."""
    free, total = device.memory()
    return BackendError(
        f"{name}: out of GPU memory: {what}; it needs about {amount(needed)}, {amount(free)} of {amount(total)} are "
        f"free; what lowers it: memory='stage', smaller pictures or fewer at a time, and engines built with a smaller "
        f"--size or --batch, with --weight-streaming, or with --static"
    )


def amount(size: int) -> str:
    """Bytes as people read them."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
