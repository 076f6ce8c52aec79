"""What a bundle says of itself: `manifest.json` as frozen dataclasses, checked when it is read.

A bundle is a folder with `manifest.json`, `*.onnx`, `weights/*.safetensors`, `tokenizer.json` and, where it was
exported with checks, `reference.safetensors`. Every file is named with its size and SHA-256.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from .errors import BundleError
from .spec import TensorSpec

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 64 * 2**20

Precision = Literal["fp32", "fp16", "bf16"]
FamilyName = Literal["kandinsky-2-1", "kandinsky-2-2", "kandinsky-3"]
Sha256 = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
Size = Annotated[int, msgspec.Meta(ge=0)]


@dataclass(frozen=True)
class FileRecord:
    """A file of the bundle: path relative to the bundle's folder with forward slashes, size in bytes, hash."""

    file: str
    size: Size
    sha256: Sha256


@dataclass(frozen=True)
class GraphError:
    """How far a graph is from the module it was traced from, on random inputs, over all of its outputs.

    relative is the L2 norm of the difference over the L2 norm of the module's output (the worst output's), max_abs the
    largest absolute difference; tolerance is the bound that `relative` was held to.
    """

    relative: float
    max_abs: float
    tolerance: float


@dataclass(frozen=True)
class Quantization:
    """How a graph came to compute in 8 bits: static scales of activations and weights, in the graph's own nodes.

    layers are those in 8 bits, kept those that could be and were left in the graph's precision, by what was measured;
    both by the name of their weight. samples is the number of calls whose activations set the scales, error the
    relative L2 error of the output against the graph before, over calls that did not.
    """

    layers: tuple[str, ...]
    kept: tuple[str, ...]
    samples: Annotated[int, msgspec.Meta(ge=1)]
    error: float


@dataclass(frozen=True)
class Component:
    """One graph: what goes in and out, which weights files it reads, at which precision it computes."""

    graph: FileRecord
    weights: tuple[str, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    precision: Precision
    parameters: Size
    error: GraphError | None = None
    quantization: Quantization | None = None


@dataclass(frozen=True)
class PriorRecord:
    """Names of the components that turn text into image embeddings, and where their statistics lie.

    `statistics` is a safetensors file with `clip_mean`, `clip_std` and `zero_image_embeds`, float32 [1, D] each: the
    mean and deviation of CLIP image embeddings, and the embedding of an all-zero pixel tensor.
    """

    text_encoder: str
    image_encoder: str
    context: str
    step: str
    scheduler: str
    statistics: FileRecord
    embedding_dim: Annotated[int, msgspec.Meta(ge=1)]


@dataclass(frozen=True)
class TokenizerRecord:
    """A Hugging Face tokenizers file and the number of tokens a prompt is padded and cut to."""

    file: FileRecord
    max_length: Annotated[int, msgspec.Meta(ge=1)]
    pad_token_id: Annotated[int, msgspec.Meta(ge=0)]


@dataclass(frozen=True)
class PromptRecord:
    """What reads the prompt of a decoder that is conditioned by text: a component, and its tokenizer.

    states_dim is the width of a token's state.
    """

    encoder: str
    tokenizer: TokenizerRecord
    states_dim: Annotated[int, msgspec.Meta(ge=1)]


@dataclass(frozen=True)
class FeatureReuse:
    """Names of the two components that stand in for a decoder's step where deep features are used for several steps.

    refresh takes and gives what the step does, and gives `features` beside; shallow takes `features` beside and runs
    the outermost level alone.
    """

    refresh: str
    shallow: str


@dataclass(frozen=True)
class DecoderRecord:
    """Names of the components that turn image embeddings, texts or both into pictures.

    embedding_dim is the width of image embeddings and None where none are taken, prompt None where no text is; scale
    is the pixels a latent cell in height and width, size_multiple what height and width in pixels must be divisible
    by, default_size the side of a picture as the checkpoint was trained for. scheduler is the checkpoint's own,
    schedulers others whose configuration it brings. reuse is there where the export was asked for it.
    """

    context: str
    step: str
    movq_encoder: str
    movq_decoder: str
    scheduler: str
    embedding_dim: Annotated[int, msgspec.Meta(ge=1)] | None
    scale: Annotated[int, msgspec.Meta(ge=1)]
    size_multiple: Annotated[int, msgspec.Meta(ge=1)]
    default_size: Annotated[int, msgspec.Meta(ge=1)]
    prompt: PromptRecord | None = None
    schedulers: tuple[str, ...] = ()
    reuse: FeatureReuse | None = None


@dataclass(frozen=True)
class Source:
    """A checkpoint the bundle was made from, as the user named it.

    revision is the commit where it came from the hub, variant the kind of weight files that was asked for ("fp16").
    """

    checkpoint: str
    kind: str
    revision: str | None = None
    variant: str | None = None


Role = Literal["decoder", "inpaint", "controlnet"]


@dataclass(frozen=True)
class Manifest:
    """All of manifest.json.

    `tokenizer` is the prior's. `storage` is what weights are stored in where that is not what graphs compute in: fp16
    or bf16 under fp32.
    """

    schema_version: int
    family: FamilyName
    precision: Precision
    components: dict[str, Component]
    weights: dict[str, FileRecord]
    schedulers: dict[str, dict[str, Any]]
    sources: tuple[Source, ...]
    tools: dict[str, str]
    prior: PriorRecord | None = None
    decoders: dict[Role, DecoderRecord] = field(default_factory=dict)
    tokenizer: TokenizerRecord | None = None
    image_processor: dict[str, Any] | None = None
    reference: FileRecord | None = None
    storage: Precision | None = None

    def files(self) -> Mapping[str, FileRecord]:
        """Every file that the bundle consists of, by path, manifest.json apart."""
        records = [component.graph for component in self.components.values()]
        records += self.weights.values()
        records += [self.prior.statistics] if self.prior else []
        records += [self.tokenizer.file] if self.tokenizer else []
        records += [prompt.tokenizer.file for prompt in self.prompts().values()]
        records += [self.reference] if self.reference else []
        return {record.file: record for record in records}

    def prompts(self) -> Mapping[Role, PromptRecord]:
        """What reads the prompts of decoders, by role."""
        return {role: record.prompt for role, record in self.decoders.items() if record.prompt}

    def component_files(self, name: str) -> list[FileRecord]:
        """The graph and the weights of one component."""
        component = self.components[name]
        return [component.graph, *(self.weights[weights] for weights in component.weights)]


def encode_manifest(manifest: Manifest) -> bytes:
    """manifest.json as indented UTF-8 with a final newline."""
    return msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n"


def decode_manifest(data: bytes, where: str) -> Manifest:
    """Read manifest.json; `where` names the file in errors.

    Raises BundleError for another schema version, a field of a wrong type, a path that leaves the bundle, and a name
    that nothing defines.
    """
    try:
        version = msgspec.json.decode(data, type=dict[str, Any]).get("schema_version")
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(f"{where} is not a manifest: {error}; export the bundle again") from error
    if version != SCHEMA_VERSION:
        raise BundleError(
            f"{where}: expected schema_version {SCHEMA_VERSION}, found {version!r}; "
            f"use the version of kandrt that made the bundle, or export it again"
        )
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
    except (msgspec.ValidationError, UnicodeDecodeError) as error:
        raise BundleError(f"{where} is damaged: {error}; export the bundle again") from error
    problems = dangling(manifest) + unsafe(manifest) + odd_tensors(manifest)
    problems += odd_prompts(manifest) if not problems else []
    if problems:
        raise BundleError(f"{where} is damaged: {'; '.join(problems)}; export the bundle again")
    return manifest


def dangling(manifest: Manifest) -> list[str]:
    """Names that are used and not defined."""
    uses: list[tuple[str, str, Mapping[str, Any]]] = []
    for name, component in manifest.components.items():
        uses += [(f"components.{name}.weights", weights, manifest.weights) for weights in component.weights]
    records: dict[str, PriorRecord | DecoderRecord] = {f"decoders.{role}": r for role, r in manifest.decoders.items()}
    if manifest.prior is not None:
        records["prior"] = manifest.prior
    for where, record in records.items():
        uses.append((f"{where}.scheduler", record.scheduler, manifest.schedulers))
        names = ("text_encoder", "image_encoder", "context", "step", "movq_encoder", "movq_decoder")
        uses += [(f"{where}.{n}", getattr(record, n), manifest.components) for n in names if hasattr(record, n)]
        if isinstance(record, DecoderRecord):
            uses += [(f"{where}.schedulers", name, manifest.schedulers) for name in record.schedulers]
            prompt = record.prompt
            uses += [(f"{where}.prompt.encoder", prompt.encoder, manifest.components)] if prompt else []
            pair = asdict(record.reuse) if record.reuse else {}
            uses += [(f"{where}.reuse.{n}", name, manifest.components) for n, name in pair.items()]
    problems = [f"{where} names {name!r}, which is not defined" for where, name, defined in uses if name not in defined]
    if manifest.prior is not None and (manifest.tokenizer is None or manifest.image_processor is None):
        problems.append("a prior needs tokenizer and image_processor")
    if manifest.prior is None and not manifest.decoders:
        problems.append("neither a prior nor a decoder")
    problems += [
        f"decoders.{role} takes neither image embeddings nor prompts"
        for role, record in manifest.decoders.items()
        if record.embedding_dim is None and record.prompt is None
    ]
    return problems


def unsafe(manifest: Manifest) -> list[str]:
    """Paths that are not plain relative paths inside the bundle, on any system."""

    def plain(file: str) -> bool:
        return not set(file) & set('\\:*?"<>|\0\n') and not {"", ".", ".."} & set(file.split("/"))

    return [f"path {file!r} is not one inside the bundle" for file in manifest.files() if not plain(file)]


def odd_tensors(manifest: Manifest) -> list[str]:
    """Inputs and outputs of which two have one name, or whose axes have no length."""
    problems = []
    for name, component in manifest.components.items():
        tensors = [*component.inputs, *component.outputs]
        if len({tensor.name for tensor in tensors}) < len(tensors):
            problems.append(f"components.{name} names a tensor twice")
        problems += [
            f"components.{name}: {tensor} has an axis without a length"
            for tensor in tensors
            if not all(axis > 0 if isinstance(axis, int) else axis for axis in tensor.shape)
        ]
    return problems


def odd_prompts(manifest: Manifest) -> list[str]:
    """Prompts whose record says other than their text encoder, or than another record says of the same file."""
    problems, known = [], dict[str, FileRecord]()
    for role, prompt in manifest.prompts().items():
        component, tokenizer = manifest.components[prompt.encoder], prompt.tokenizer
        shapes = {tensor.name: tensor.shape for tensor in (*component.inputs, *component.outputs)}
        for name, said in (("input_ids", tokenizer.max_length), ("text_states", prompt.states_dim)):
            if said not in shapes.get(name, ())[-1:]:
                problems.append(
                    f"decoders.{role}.prompt says {said} of {prompt.encoder}'s {name}, it has {shapes.get(name)}"
                )
        if known.setdefault(tokenizer.file.file, tokenizer.file) != tokenizer.file:
            problems.append(f"{tokenizer.file.file} is recorded twice, differently")
    return problems


def missing_files(folder: Path, files: Mapping[str, FileRecord]) -> list[str]:
    """What of `files` is absent from `folder`, outside of it through a link, or of another size than recorded."""
    root, problems = Path(os.path.realpath(folder)), []
    for name, record in files.items():
        path = Path(os.path.realpath(root / name))
        try:
            status = path.stat()
        except (OSError, ValueError):  # such as a name too long, or one that the file system cannot encode
            status = None
        if not path.is_relative_to(root):
            problems.append(f"{name} is a link out of the bundle")
        elif status is None or not stat.S_ISREG(status.st_mode):
            problems.append(f"{name} is missing")
        elif status.st_size != record.size:
            problems.append(f"{name}: expected {record.size} bytes, found {status.st_size}")
    return problems
