"""Where tensors come from: safetensors files, or numbers made up from their names.

A source fills one tensor, or one slice of it, at a time; each rank reads only its own. On a GPU the files' numbers are
on their way until `finish`, so that many are read at once.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from diptych.errors import ConfigError
from diptych.model.noise import hash_text, uniform
from diptych.model.upload import Matrix, Uploader

HARMLESS = re.compile(r"rotary_emb\.inv_freq$")  # written by old converters; computed here
FINGERPRINT_BYTES = 64  # looked at in each tensor, at its start, middle and end
DUMMY_RANGE = 1e-3
DUMMY_BLOCK = 1 << 24  # numbers made at once, to bound the memory between
# The names of safetensors' format, for types that a checkpoint may have.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}

Slice = tuple[int, int]  # [start, stop)


class WeightSource(Protocol):
    """Tensors come on `device`, in `dtype`."""

    num_parameters: int  # in the whole model, counted as they are handed out or noted
    dtype: torch.dtype
    device: str

    def note(self, name: str, shape: Sequence[int]) -> None:
        """The model has a tensor `name` of `shape`, which other ranks read. Raises ConfigError if it is not so."""

    def get(self, name: str, shape: Sequence[int], part: Slice | None = None, dim: int = 0) -> Tensor:
        """The tensor `name`, which has `shape`; or its slice `part` along `dim`. Raises ConfigError."""

    def read(self, out: Tensor, name: str, shape: Sequence[int], part: Slice | None = None, dim: int = 0) -> None:
        """As `get`, but into `out`; on a GPU it is filled only once `finish` returns."""

    def finish(self, optional: Sequence[str] = ()) -> None:
        """Call after the last `get`, `read` or `note`. Raises ConfigError naming tensors of none; `optional` ones may
        be."""

    def fingerprint(self) -> str:
        """Equal for equal checkpoints, whatever the rank and how many there are. Cheap."""


class SafetensorsSource:
    """`*.safetensors` of a folder: those its index names, else all there are."""

    def __init__(self, folder: Path, dtype: torch.dtype, device: str = "cpu") -> None:
        self.dtype, self.device = dtype, device
        self._files = find_files(folder)
        self._handles = [_open(path) for path in self._files]
        self._owner = {name: handle for handle in self._handles for name in handle.keys()}  # noqa: SIM118
        self._taken: set[str] = set()
        self.num_parameters = 0

    def note(self, name: str, shape: Sequence[int]) -> None:
        self._look_up(name, shape)

    def _look_up(self, name: str, shape: Sequence[int]) -> Any:
        if name not in self._owner:
            raise ConfigError(f"the checkpoint lacks tensor {name}")
        view = self._owner[name].get_slice(name)
        if list(view.get_shape()) != list(shape):
            raise ConfigError(f"tensor {name} has shape {view.get_shape()}, config.json implies {list(shape)}")
        if name not in self._taken:
            self._taken.add(name)
            self.num_parameters += _count(shape)
        return view

    def get(self, name: str, shape: Sequence[int], part: Slice | None = None, dim: int = 0) -> Tensor:
        view = self._look_up(name, shape)
        if part is None:
            tensor = view[:]
        elif dim == 0:
            tensor = view[part[0] : part[1]]
        else:
            tensor = view[:, part[0] : part[1]]
        return tensor.to(self.device, self.dtype).contiguous()

    def read(self, out: Tensor, name: str, shape: Sequence[int], part: Slice | None = None, dim: int = 0) -> None:
        out.copy_(self.get(name, shape, part, dim))

    def finish(self, optional: Sequence[str] = ()) -> None:
        extra = sorted(n for n in self._owner if n not in self._taken | set(optional) and not HARMLESS.search(n))
        if extra:
            shown = ", ".join(extra[:3]) + (f" and {len(extra) - 3} more" if len(extra) > 3 else "")
            raise ConfigError(f"the checkpoint has tensors that {_plural(extra)} no place in this model: {shown}")

    def fingerprint(self) -> str:
        return fingerprint(self._files)


class UploadedSource(SafetensorsSource):
    """The same, but what is `read` is uploaded by several threads meanwhile, up to `finish`."""

    def __init__(self, folder: Path, dtype: torch.dtype, device: str, progress: Callable[[str], None]) -> None:
        super().__init__(folder, dtype, device)
        self._uploader = Uploader(device, progress)
        self._headers = [(path, *_header(path)) for path in self._files]

    def read(self, out: Tensor, name: str, shape: Sequence[int], part: Slice | None = None, dim: int = 0) -> None:
        self._look_up(name, shape)
        rows, columns = (0, shape[0]), slice(None)
        if dim == 0:
            rows = part or rows
        elif part is not None:
            columns = slice(*part)
        self._uploader.put(self._place(name).take(*rows), columns, _rows(out))

    def _place(self, name: str) -> Matrix:
        """Where a tensor is; one of one dimension has one column."""
        path, start, info = next((path, start, header[name]) for path, start, header in self._headers if name in header)
        if info["dtype"] not in DTYPES:
            raise ConfigError(f"tensor {name} is of type {info['dtype']}, which cannot be loaded")
        rows, columns = info["shape"][0], _count(info["shape"][1:])
        return Matrix(path, start + info["data_offsets"][0], rows, columns, DTYPES[info["dtype"]])

    def finish(self, optional: Sequence[str] = ()) -> None:
        super().finish(optional)
        self._uploader.finish()


class DummySource:
    """Every tensor uniform(-1e-3, 1e-3), a function of the seed, the tensor's name and the place in it."""

    def __init__(self, seed: int, dtype: torch.dtype, device: str = "cpu") -> None:
        self._seed = seed
        self.dtype, self.device = dtype, device
        self._taken: dict[str, int] = {}
        self.num_parameters = 0

    def note(self, name: str, shape: Sequence[int]) -> None:
        if name not in self._taken:
            self._taken[name] = _count(shape)
            self.num_parameters += _count(shape)

    def get(self, name: str, shape: Sequence[int], part: Slice | None = None, dim: int = 0) -> Tensor:
        size = list(shape)
        if part is not None:
            size[dim] = part[1] - part[0]
        out = torch.empty(size, dtype=self.dtype, device=self.device)
        self.read(out, name, shape, part, dim)
        return out

    def read(self, out: Tensor, name: str, shape: Sequence[int], part: Slice | None = None, dim: int = 0) -> None:
        self.note(name, shape)
        key, row = hash_text(f"{self._seed}/{name}"), _count(shape[1:])
        first = part[0] if part is not None and dim == 0 else 0
        columns = slice(*part) if part is not None and dim == 1 else slice(None)
        for block in _rows(out).split(max(1, DUMMY_BLOCK // row)):
            values = uniform(key, first * row, (first + len(block)) * row, self.device)
            block.copy_((values * (2 * DUMMY_RANGE) - DUMMY_RANGE).view(len(block), row)[:, columns])
            first += len(block)

    def finish(self, optional: Sequence[str] = ()) -> None:
        """Nothing can be left over."""

    def fingerprint(self) -> str:
        text = f"{self._seed} {sorted(self._taken.items())}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def open_weights(
    folder: Path, load_format: str, dtype: torch.dtype, device: str, seed: int, progress: Callable[[str], None]
) -> WeightSource:
    """The source that `--load-format` asks for. Raises ConfigError if the folder has no usable weights."""
    if load_format == "dummy":
        return DummySource(seed, dtype, device)
    if device == "cpu":
        return SafetensorsSource(folder, dtype)
    return UploadedSource(folder, dtype, device, progress)


def fingerprint(files: Sequence[Path]) -> str:
    """A hash of the names, types and shapes of all tensors in safetensors files, and of a few bytes of each."""
    digest = hashlib.sha256()
    for path in files:
        for name, info, samples in _sample_tensors(path):
            digest.update(f"{name} {info['dtype']} {info['shape']}\n".encode())
            digest.update(samples)
    return digest.hexdigest()[:16]


def _count(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _rows(out: Tensor) -> Tensor:
    """`out` with two dimensions."""
    return out.view(out.shape[0], _count(out.shape[1:]))


def _plural(names: Sequence[str]) -> str:
    return "has" if len(names) == 1 else "have"


def find_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise ConfigError("the model folder has no *.safetensors; for random weights use --load-format dummy")
        return files
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError("model.safetensors.index.json is no index of safetensors files") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise ConfigError(f"model.safetensors.index.json names {name!r}, which is no plain file name")
        if not (folder / name).is_file():
            raise ConfigError(f"model.safetensors.index.json names {name}, which is missing")
    return [folder / name for name in names]


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu").__enter__()
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path.name} is no readable safetensors file: {error}") from None


def _sample_tensors(path: Path) -> list[tuple[str, dict[str, Any], bytes]]:
    """Name, header entry and a few bytes of each tensor of a file, by name."""
    found = []
    data_start, header = _header(path)
    with path.open("rb") as file:
        for name, info in sorted(header.items()):
            start, stop = info["data_offsets"]
            samples = b""
            for at in (start, (start + stop) // 2, stop - FINGERPRINT_BYTES):
                file.seek(data_start + max(start, at))
                samples += file.read(min(FINGERPRINT_BYTES, stop - max(start, at)))
            found.append((name, info, samples))
    return found


def _header(path: Path) -> tuple[int, dict[str, dict[str, Any]]]:
    """Where a file's data begin, and its header's entries by tensor (format: 8 bytes of length, JSON, data)."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    return 8 + size, header
