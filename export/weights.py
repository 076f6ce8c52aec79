"""Reading the tensors of one submodel's folder, one at a time, whichever files hold them."""

from __future__ import annotations

import json
import math
import pickle
import re
import struct
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..engines.errors import CheckpointError

# Names of safetensors' header -> torch
DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# File names of diffusers and transformers, safetensors before pickles
STEMS: Mapping[str, tuple[str, ...]] = {
    "safetensors": ("diffusion_pytorch_model", "model"),
    "bin": ("diffusion_pytorch_model", "pytorch_model"),
}
VARIANTS = (None, "fp16", "bf16")  # in order of preference
# Tensors that old checkpoints store and that are computed today
IGNORED = re.compile(r"(.*\.)?embeddings\.position_ids")
# diffusers, ModelMixin._fix_state_dict_keys_on_load: names of the attention blocks before they were all `Attention`
DEPRECATED_ATTENTION = re.compile(r"(.*\battentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)")
ATTENTION_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
MAX_HEADER = 100_000_000  # bytes, as in the safetensors library
LISTED = 10  # names that a message shows of each kind


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, under the name it has there; `offset` in bytes from the file's start, None in a pickle."""

    file: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int | None


@dataclass(frozen=True)
class Weights:
    """The tensors of one submodel's folder by name; holds no open file, so there is nothing to close."""

    folder: Path
    stored: Mapping[str, StoredTensor] = field(repr=False)

    @classmethod
    def open(cls, folder: Path, variant: str | None = None) -> Weights:
        """Read the names, types and shapes in `folder`, and check that its files are whole.

        Takes `.safetensors` before `.bin`, `variant` before the plain files before the other variants, one file or
        shards with an index. Old attention names are renamed, and tensors that are computed today left out.

        Raises CheckpointError for a folder without weights, a missing shard, and a damaged or unsupported file.
        """
        try:
            files = weight_files((path.name for path in folder.iterdir() if path.is_file()), variant)
        except OSError as error:
            raise CheckpointError(f"cannot read the folder {folder}: {error.strerror}") from error
        if not files:
            raise CheckpointError(
                f"no weights in {folder}: expected diffusion_pytorch_model.safetensors, model.safetensors or their "
                f"sharded, fp16 or .bin forms, found {_names(folder)}"
            )
        index = next((name for name in files if name.endswith(".json")), None)
        stored = _read_index(folder / index) if index else _read_names(folder / files[0])
        kept = {name: tensor for name, tensor in stored.items() if not IGNORED.fullmatch(name)}
        return cls(folder, {_current_name(name, kept): tensor for name, tensor in kept.items()})

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor by name."""
        return {name: tensor.shape for name, tensor in self.stored.items()}

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """The stored type of every tensor by name."""
        return {name: tensor.dtype for name, tensor in self.stored.items()}

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor into memory of its own, contiguous, in its stored type.

        Raises CheckpointError for a name that is not there, or a file that cannot be read.
        """
        if name not in self.stored:
            raise CheckpointError(f"{self.folder} holds no tensor {name!r}")
        tensor = self.stored[name]
        try:
            return _read_pickled(tensor) if tensor.offset is None else _read_raw(tensor, tensor.offset)
        except OSError as error:
            raise CheckpointError(f"cannot read {tensor.name!r} of {tensor.file}: {error}") from error


def check_names(
    what: str, expected: Mapping[str, Sequence[int]], weights: Weights, unused: Collection[str] = ()
) -> None:
    """Raise CheckpointError that lists every missing, unexpected and misshapen tensor at once.

    `expected` maps names to shapes; `unused` are names that may be there and that nothing needs.
    """
    found = weights.shapes
    missing = sorted(expected.keys() - found.keys())
    unexpected = sorted(found.keys() - expected.keys() - set(unused))
    misshapen = [
        f"{name} (expected {list(expected[name])}, found {list(found[name])})"
        for name in sorted(expected.keys() & found.keys())
        if tuple(expected[name]) != found[name]
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen}
    if problems := [f"{len(names)} {kind}: {_shorten(names)}" for kind, names in kinds.items() if names]:
        raise CheckpointError(
            f"the weights in {weights.folder} are not those of {what} with this config.json: {'; '.join(problems)}"
        )


def weight_files(names: Iterable[str], variant: str | None = None) -> list[str]:
    """Choose the files to read among a folder's `names`: one file, or an index and its shards, or none."""
    present = sorted(names)
    for extension, stems in STEMS.items():
        for kind in dict.fromkeys((variant, *VARIANTS)):
            for stem in stems:
                if files := _files_of(present, stem, extension, kind):
                    return files
    return []


def _files_of(present: Sequence[str], stem: str, extension: str, variant: str | None) -> list[str]:
    dotted = f".{variant}" if variant else ""
    if (single := f"{stem}{dotted}.{extension}") in present:
        return [single]
    # a variant's name stands before or after the number, as releases of diffusers and transformers differ
    indexes = (f"{stem}.{extension}.index{dotted}.json", f"{stem}.{extension}{dotted}.index.json")
    shard = re.compile(rf"{stem}({re.escape(dotted)}-\d+-of-\d+|-\d+-of-\d+{re.escape(dotted)})\.{extension}")
    for index in indexes:
        if index in present:
            return [index, *filter(shard.fullmatch, present)]
    return []


def _read_index(index: Path) -> dict[str, StoredTensor]:
    try:
        content = json.loads(index.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read the index {index}: {error}") from error
    match content:
        case {"weight_map": dict(weight_map)} if all(
            isinstance(shard, str) and shard == Path(shard).name for shard in weight_map.values()
        ):
            shards = sorted(set(weight_map.values()))
        case _:
            raise CheckpointError(f"{index}: expected an object with a weight_map from tensor names to file names")
    if missing := [shard for shard in shards if not (index.parent / shard).is_file()]:
        raise CheckpointError(f"{index.parent} lacks files that {index.name} lists: {_shorten(missing)}; fetch again")
    tensors = {shard: _read_names(index.parent / shard) for shard in shards}
    if absent := [name for name, shard in weight_map.items() if name not in tensors[shard]]:
        raise CheckpointError(f"{index} lists tensors that their files do not hold: {_shorten(absent)}")
    return {name: tensors[shard][name] for name, shard in weight_map.items()}


def _read_names(file: Path) -> dict[str, StoredTensor]:
    if file.suffix == ".bin":
        return {
            name: StoredTensor(file, name, tensor.dtype, tuple(tensor.shape), None)
            for name, tensor in _load_pickle(file).items()
        }
    try:
        with file.open("rb") as opened:
            start = opened.read(8)
            (length,) = struct.unpack("<Q", start.ljust(8, b"\0"))
            size = file.stat().st_size
            if start == b"version ":
                raise CheckpointError(f"{file} is a Git LFS pointer, not the weights: run git lfs pull")
            if len(start) < 8 or not 2 <= length <= min(size - 8, MAX_HEADER):
                raise CheckpointError(f"{file} is not a safetensors file, or cut short: {size} bytes")
            text = opened.read(length)
        return _parse_header(file, json.loads(text), start=8 + length, size=size)
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{file}: the header is not JSON ({error})") from error


def _parse_header(file: Path, header: object, start: int, size: int) -> dict[str, StoredTensor]:
    """Read the entries of a safetensors header; the data, from byte `start` to `size`, must be as long as they say."""
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: the header is not a JSON object")
    tensors, spans = {}, []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        match entry:
            case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(begin), int(end)]} if (
                dtype in DTYPES
                and all(isinstance(axis, int) and axis >= 0 for axis in shape)
                and end - begin == math.prod(shape) * DTYPES[dtype].itemsize
            ):
                tensors[name] = StoredTensor(file, name, DTYPES[dtype], tuple(shape), start + begin)
                spans.append((begin, end))
            case _:
                raise CheckpointError(f"{file}: damaged entry or unknown type of {name!r} in the header: {entry}")
    end = 0
    for begin, until in sorted(spans):
        if begin != end:
            raise CheckpointError(f"{file}: the header's tensors overlap or leave gaps at byte {start + end}")
        end = until
    if start + end != size:
        raise CheckpointError(
            f"{file} is damaged: its header announces {start + end} bytes, found {size}; fetch or convert it again"
        )
    return tensors


def _load_pickle(file: Path) -> dict[str, torch.Tensor]:
    """Map a `.bin` file into memory; only pages that are touched are read."""
    try:
        content = torch.load(str(file), map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"cannot read {file} as a file of tensors ({reason}); fetch it again, or save it as safetensors"
        ) from error
    if not isinstance(content, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in content.values()):
        raise CheckpointError(f"{file}: expected a dictionary from names to tensors, found {type(content).__name__}")
    return content


def _read_pickled(tensor: StoredTensor) -> torch.Tensor:
    # mapped anew for each tensor: pages of a map that stays count as this process's memory
    return _load_pickle(tensor.file)[tensor.name].detach().clone(memory_format=torch.contiguous_format)


def _read_raw(tensor: StoredTensor, offset: int) -> torch.Tensor:
    data = torch.empty(math.prod(tensor.shape) * tensor.dtype.itemsize, dtype=torch.uint8)
    view, done = data.numpy().data, 0
    with tensor.file.open("rb", buffering=0) as file:
        file.seek(offset)
        while done < len(view):
            if not (length := file.readinto(view[done:])):
                raise CheckpointError(f"{tensor.file} ends within {tensor.name!r}: it changed since it was opened")
            done += length
    return data.view(tensor.dtype).reshape(tensor.shape)


def _current_name(name: str, present: Collection[str]) -> str:
    if match := DEPRECATED_ATTENTION.fullmatch(name):
        block, old, kind = match.groups()
        current = f"{block}.{ATTENTION_NAMES[old]}.{kind}"
        return name if current in present else current
    return name


def _shorten(names: Sequence[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


def _names(folder: Path) -> str:
    return _shorten(sorted(path.name for path in folder.iterdir())) or "nothing"
