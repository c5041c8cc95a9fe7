"""The weights of a model folder, read one parameter at a time under the names that the model gives them.

`transformers` says how names on disk become names in the model (GPT-NeoX files hold `embed_out` where the module is
`lm_head`), and which tensors on disk make one parameter (the experts of Mixtral lie there one by one).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from gearshift.engine.folder import weight_files
from gearshift.errors import UserError, one_line

# Computed, not learned, and once saved all the same by older versions of `transformers`.
_BUFFERS = (".inv_freq", ".masked_bias", ".attn.bias", ".attention.bias")


@dataclass(frozen=True)
class _Stored:
    """A tensor on disk, and the pattern of the converter that takes it (None: it is a parameter as it is)."""

    file: Path
    key: str
    pattern: str | None

    def read(self) -> Tensor:
        # Opened anew for each tensor: every page that was read of a mapped file counts as memory until it is closed.
        with safe_open(self.file, framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(self.key)
        return tensor

    def shape(self) -> list[int]:
        with safe_open(self.file, framework="pt") as opened:
            found: list[int] = list(opened.get_slice(self.key).get_shape())
        return found


@dataclass
class _Source:
    """What a parameter is read from: one tensor, or several and how they are put together."""

    converter: Any = None  # transformers' WeightConverter
    stored: list[_Stored] = field(default_factory=list)


class SafetensorsFolder:
    """The weights of a `save_pretrained` folder, under the names of the given model."""

    def __init__(self, folder: Path, model: Any):
        self.folder, self._model = folder, model
        self._sources = self._find_sources()

    def __contains__(self, name: str) -> bool:
        return name in self._sources

    def read(self, name: str) -> Tensor:
        source = self._sources[name]
        return self._joined(name, source, [stored.read() for stored in source.stored])

    def place(self, name: str) -> tuple[Path, str] | None:
        """The file that holds a parameter as it is, and under which name. None where it is put together."""
        source = self._sources.get(name)
        if source is None or source.converter is not None:
            return None
        return source.stored[0].file, source.stored[0].key

    def check(self, model: nn.Module, may_be_missing: Iterable[str] = ()) -> None:
        """Every parameter is there, with the shape that the config says, or UserError names the first that is not."""
        allowed = set(may_be_missing)
        for path, parameter in model.named_parameters():
            if path not in self:
                if path not in allowed:
                    raise UserError(f"{self.folder}: the weights lack {path}")
                continue
            shape = self._shape(path)
            if shape != list(parameter.shape):
                raise UserError(
                    f"{self.folder}: {path} has shape {shape}, the model's config says {list(parameter.shape)}"
                )
        known = set(model.state_dict(keep_vars=True)) | {name for name, _ in model.named_buffers()}
        heads = ("lm_head.", "score.", "embed_out.") if allowed else ()  # the head of what the backbone is taken from
        left = [name for name in self._sources if name not in known and not name.startswith(heads)]
        left = [name for name in left if not name.endswith(_BUFFERS)]
        if left:
            raise UserError(
                f"{self.folder}: {left[0]} has no place in a {type(model).__name__} ({len(left)} such weights)"
            )

    def _shape(self, name: str) -> list[int]:
        source = self._sources[name]
        shapes = [stored.shape() for stored in source.stored]
        if source.converter is None:
            return shapes[0]
        return list(self._joined(name, source, [torch.empty(shape, device="meta") for shape in shapes]).shape)

    def _joined(self, name: str, source: _Source, tensors: list[Tensor]) -> Tensor:
        """The parameter that the stored tensors make."""
        if source.converter is None:
            return tensors[0]
        converter = copy.deepcopy(source.converter)  # it collects what it is given
        for stored, tensor in zip(source.stored, tensors, strict=True):
            converter.add_tensor(name, stored.key, stored.pattern, tensor)
        try:
            found: Tensor = converter.convert(name, model=self._model, config=self._model.config)[name]
        except Exception as error:  # too few experts, shapes that do not fit: each operation raises its own types
            raise UserError(
                f"{self.folder}: {name} cannot be put together from {len(tensors)} tensors, {source.stored[0].key} and "
                f"others: {one_line(error)}"
            ) from error
        return found

    def _find_sources(self) -> dict[str, _Source]:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        transforms = get_model_conversion_mapping(self._model)
        renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        converters = [t for t in transforms if isinstance(t, WeightConverter)]
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        own = self._model.state_dict()
        sources: dict[str, _Source] = {}
        for key, file in sorted(weight_files(self.folder).items(), key=lambda entry: _natural(entry[0])):
            name, pattern = rename_source_key(key, renamings, converters, self._model.base_model_prefix, own)
            if name not in own and key in own:  # the model's own name, which a rule took for an older one
                name, pattern = key, None
            converter = None if pattern is None else by_pattern[pattern]
            if converter is not None and len(converter.target_patterns) > 1:
                raise UserError(
                    f"{self.folder}: {key} must be split to become {name} and others, which is not supported yet for "
                    "this architecture"
                )
            sources.setdefault(name, _Source(converter)).stored.append(_Stored(self.folder / file, key, pattern))
        return sources


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """Sort key: expert 2 before expert 10."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"\.", name)]


def persistent_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The buffers that belong to a model's weights though no gradient moves them (a router's correction bias)."""
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, buffer
