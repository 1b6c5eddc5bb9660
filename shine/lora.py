"""The generated LoRA: what it is, and how a flat memory state is cut into one.

A LoRA maps the path of a linear inside the backbone to a pair ``(A, B)`` with ``A [B, in, r]`` and ``B [B, r, out]``; the
linear then computes ``x W^T + bias + (x A) B``. Any scale is already inside the pair. A leading size of one stands for
"the same for every sample".
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from shine.adapter_files import read_adapter, write_adapter
from shine.provenance import Provenance

LAYOUTS = ("rl", "lr", "rr", "ll")


@dataclass(frozen=True)
class LinearShape:
    """A linear of the backbone that a LoRA touches: its module path, input and output features."""

    path: str
    in_features: int
    out_features: int

    def parameters(self, rank: int) -> int:
        """Number of values in ``A`` and ``B`` together at this rank."""
        return rank * (self.in_features + self.out_features)

    def largest_rank(self) -> int:
        """The rank beyond which a low-rank update is none."""
        return min(self.in_features, self.out_features)


@dataclass(frozen=True)
class LoRA(Mapping[str, tuple[Tensor, Tensor]]):
    """A LoRA for every target linear: module path -> ``(A [B, in, r], B [B, r, out])``.

    A value: no method changes the object it is called on.

    Attributes:
        provenance: for each sample, where the spans of its rank come from; empty where that is not known, as in training.
    """

    weights: Mapping[str, tuple[Tensor, Tensor]]
    provenance: tuple[tuple[Provenance, ...], ...] = ()

    def __post_init__(self) -> None:
        assert not self.provenance or len(self.provenance) == self.batch

    def __getitem__(self, path: str) -> tuple[Tensor, Tensor]:
        return self.weights[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other

    @property
    def batch(self) -> int:
        """Number of adapters side by side."""
        return next(iter(self.weights.values()))[0].shape[0]

    @property
    def rank(self) -> int:
        """The largest rank of any linear."""
        return max(a.shape[2] for a, _ in self.values())

    def scale(self, strength: float) -> LoRA:
        """The update times ``strength`` (only ``B`` is scaled, so that the update is linear in it).

        Raises:
            ValueError: the strength is infinite or not a number.
        """
        if not math.isfinite(strength):
            raise ValueError(f"a strength of {strength}: give a finite number, such as 0.7")
        scaled = tuple(tuple(replace(p, strength=p.strength * strength) for p in spans) for spans in self.provenance)
        return LoRA({path: (a, b * strength) for path, (a, b) in self.items()}, scaled)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> LoRA:
        """The same update on another device or in another type."""
        return LoRA({path: (a.to(device, dtype), b.to(device, dtype)) for path, (a, b) in self.items()}, self.provenance)

    def require_one(self) -> None:
        """Make sure that this can be merged into weights.

        Raises:
            ValueError: these are several adapters.
        """
        if self.batch != 1:
            raise ValueError(f"these are {self.batch} adapters: merge one of them, lora.select([i])")

    def merged_into(self, path: str, weight: Tensor) -> Tensor:
        """``weight`` ``[out, in]`` of the linear at ``path`` with the update of a single adapter added.

        Summed in float32 at least and rounded once to the weight's type.
        """
        assert self.batch == 1
        wide = torch.promote_types(weight.dtype, torch.float32)
        a, b = (values[0].to(weight.device, wide) for values in self[path])
        return (weight.to(wide) + (a @ b).mT).to(weight.dtype)

    def select(self, samples: Sequence[int] | Tensor) -> LoRA:
        """The adapters of the given samples, in that order; a sample may be taken several times."""
        index = torch.as_tensor(samples, dtype=torch.long, device=next(iter(self.values()))[0].device)
        chosen = tuple(self.provenance[sample] for sample in index.tolist()) if self.provenance else ()
        return LoRA({path: (a.index_select(0, index), b.index_select(0, index)) for path, (a, b) in self.items()}, chosen)

    @staticmethod
    def concat(loras: Sequence[LoRA]) -> LoRA:
        """One LoRA whose update is the exact sum of the updates: ranks are laid side by side.

        Where one of them is of unknown origin, so is the sum.

        Raises:
            ValueError: no LoRA was given, or they do not touch the same linears, or differ in batch.
        """
        if not loras:
            raise ValueError("nothing to concatenate: give at least one LoRA")
        for other in loras[1:]:
            if set(other) != set(loras[0]):
                odd = sorted(set(other) ^ set(loras[0]))[0]
                raise ValueError(
                    f"these LoRAs do not touch the same linears ({odd} is in one only): make them with one hypernetwork"
                )
            if other.batch != loras[0].batch:
                raise ValueError(
                    f"a batch of {other.batch} adapters cannot be added to one of {loras[0].batch}: take single ones with "
                    "lora.select([i])"
                )
        known = all(lora.provenance for lora in loras)
        joined = tuple(
            tuple(p for spans in sample for p in spans) for sample in zip(*(lora.provenance for lora in loras), strict=True)
        )
        return LoRA(
            {
                path: (torch.cat([lora[path][0] for lora in loras], dim=2), torch.cat([lora[path][1] for lora in loras], dim=1))
                for path in loras[0]
            },
            joined if known else (),
        )

    @staticmethod
    def stack(loras: Sequence[LoRA]) -> LoRA:
        """The adapters of all LoRAs side by side in one batch (equal ranks)."""
        return LoRA(
            {
                path: (torch.cat([lora[path][0] for lora in loras]), torch.cat([lora[path][1] for lora in loras]))
                for path in loras[0]
            },
            sum((lora.provenance for lora in loras), ()) if all(lora.provenance for lora in loras) else (),
        )

    def save(self, directory: str | Path, *, dtype: torch.dtype | None = None) -> Path:
        """Write the adapter as a folder: ``config.json`` with its provenance and ``lora.safetensors``.

        The folder appears whole or not at all; an adapter that is there already gives way.

        Args:
            dtype: store the weights in this type instead of their own.

        Raises:
            ValueError: this is more than one adapter, or the folder holds something else.
            OSError: the folder cannot be written.
        """
        if self.batch != 1:
            raise ValueError(f"this is {self.batch} adapters side by side: save each, lora.select([i]).save(...)")
        tensors = {path: (a[0].to("cpu", dtype), b[0].to("cpu", dtype)) for path, (a, b) in self.items()}
        return write_adapter(Path(directory).expanduser(), tensors, self.provenance[0] if self.provenance else ())

    @staticmethod
    def load(directory: str | Path) -> LoRA:
        """The adapter that `save` wrote, batch one, on the CPU.

        Raises:
            ValueError: there is none, or it is damaged or of a newer format.
        """
        tensors, provenance = read_adapter(Path(directory).expanduser())
        return LoRA({path: (a[None], b[None]) for path, (a, b) in tensors.items()}, (provenance,) if provenance else ())

    def spans(self) -> list[LoRA]:
        """The contexts that one joined adapter holds, as adapters of their own; their `concat` is this one again.

        Each is the span of the rank that its provenance tells; on a linear whose full rank is smaller than the span that full rank.

        Raises:
            ValueError: the origin of this adapter is not known, it was reduced as a whole, or it is several side by side.
        """
        if len(self.provenance) != 1:
            raise ValueError("only a single adapter of known origin can be taken apart: take one with lora.select([i])")
        if any(span.shared for span in self.provenance[0]):
            raise ValueError("the contexts of this adapter share its rank, since their sum was reduced: join them again, unreduced")
        parts = []
        starts = dict.fromkeys(self, 0)
        for span in self.provenance[0]:
            weights = {}
            for path, (a, b) in self.items():
                start, width = starts[path], min(span.rank, a.shape[1], b.shape[2])
                weights[path] = (a[:, :, start : start + width], b[:, start : start + width])
                starts[path] += width
            parts.append(LoRA(weights, ((span,),)))
        return parts

    def reduce(self, rank: int) -> tuple[LoRA, float]:
        """The nearest update of at most this rank, and the share of the squared norm that is left, from 0 to 1.

        Exact, up to rounding, on a linear whose update has no higher rank. Several contexts share the rank that is left: their
        provenance says so, and `spans` cannot tell them apart any more.
        """
        weights: dict[str, tuple[Tensor, Tensor]] = {}
        kept = total = 0.0
        for path, (a, b) in self.items():
            limit = min(rank, a.shape[1], b.shape[2])
            work = torch.promote_types(a.dtype, torch.float32)
            (q_a, r_a), (q_b, r_b) = torch.linalg.qr(a.to(work)), torch.linalg.qr(b.to(work).mT)
            u, singular, v = torch.linalg.svd(r_a @ r_b.mT, full_matrices=False)
            kept += float(singular[:, :limit].square().sum())
            total += float(singular.square().sum())
            if a.shape[2] <= limit:
                weights[path] = (a, b)
                continue
            root = singular[:, :limit].sqrt()
            left, right = q_a @ u[:, :, :limit] * root[:, None, :], root[:, :, None] * (v[:, :limit] @ q_b.mT)
            weights[path] = (left.to(a.dtype), right.to(b.dtype))
        share = kept / total if total else 1.0
        if rank >= self.rank:
            return LoRA(weights, self.provenance), share
        described = tuple(
            tuple(replace(p, rank=rank, kept=p.kept * share, shared=p.shared or len(spans) > 1) for p in spans)
            for spans in self.provenance
        )
        return LoRA(weights, described), share

    def cosine(self) -> Tensor:
        """Cosine between the updates of every two samples, over all linears together, ``[B, B]``.

        Near one off the diagonal means collapse: every context gets the same adapter.
        """
        gram: Tensor | float = 0.0
        for a, b in self.values():
            # <A1 B1, A2 B2> = sum((A1^T A2) * (B1 B2^T)), without ever building the [in, out] updates.
            inner_a = torch.einsum("xir,yis->xyrs", a.float(), a.float())
            inner_b = torch.einsum("xro,yso->xyrs", b.float(), b.float())
            gram = gram + (inner_a * inner_b).sum((-1, -2))
        assert isinstance(gram, Tensor)
        norm = gram.diagonal().clamp_min(torch.finfo(gram.dtype).tiny).sqrt()
        return gram / (norm[:, None] * norm[None, :])

    def pair_cosines(self) -> Tensor:
        """`cosine` of every two different samples, each pair once, ``[B (B - 1) / 2]``."""
        first, second = torch.triu_indices(self.batch, self.batch, offset=1)
        return self.cosine()[first, second]

    def inner(self, other: LoRA) -> float:
        """Inner product of two single updates over all linears, whatever their ranks; with itself the squared norm.

        Raises:
            ValueError: one is several adapters, or they do not touch the same linears.
        """
        if self.batch != 1 or other.batch != 1 or set(self) != set(other):
            raise ValueError("only two single adapters of one backbone can be compared")
        total = 0.0
        for path, (a, b) in self.items():
            other_a, other_b = (weight[0].to(a.device, torch.float64) for weight in other[path])
            total += float(((a[0].double().T @ other_a) * (b[0].double() @ other_b.T)).sum())
        return total

    def distance(self, other: LoRA) -> float:
        """Norm of what another single update is away from this one, relative to this one's norm; see `inner`."""
        square = self.inner(self)
        return math.sqrt(max(square + other.inner(other) - 2 * self.inner(other), 0.0) / square)

    def effective_rank(self) -> Tensor:
        """Mean over samples and linears of exp(entropy of the update's normalised singular values), between 1 and r.

        Not a number where a value of the LoRA is none.
        """
        ranks = []
        for a, b in self.values():
            if not (a.isfinite().all() and b.isfinite().all()):
                return torch.full((), math.nan, device=a.device)
            r_a = torch.linalg.qr(a.float(), mode="r").R
            r_b = torch.linalg.qr(b.float().mT, mode="r").R
            singular = torch.linalg.svdvals(r_a @ r_b.mT)
            share = singular / singular.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
            ranks.append(torch.special.entr(share).sum(-1).exp())
        return torch.stack(ranks).mean()


@dataclass(frozen=True)
class LoRALayout:
    """How the flat state of each layer becomes that layer's LoRA.

    ``layers[l]`` holds the linears of layer ``l`` in the order in which the state is cut: for each linear first A, then B,
    both times ``sqrt(scale)``. The two letters of ``order`` say how A, then B, lie in memory: for A, ``r`` is
    ``view(in, r)`` and ``l`` is ``view(r, in)`` transposed; for B, ``l`` is ``view(r, out)`` and ``r`` is ``view(out, r)``
    transposed. ``rl`` is the published default (paper, section on the memory-to-parameter transformer).
    """

    layers: tuple[tuple[LinearShape, ...], ...]
    rank: int
    order: str = "rl"
    scale: float = 1e-3

    def __post_init__(self) -> None:
        if self.order not in LAYOUTS:
            raise ValueError(f"unknown layout {self.order!r}: choose one of {', '.join(LAYOUTS)}")
        if self.rank < 1:
            raise ValueError(f"the LoRA rank must be at least 1, not {self.rank}")
        if self.scale <= 0:
            raise ValueError(f"the LoRA scale must be positive, not {self.scale}")
        narrowest = min((shape for layer in self.layers for shape in layer), key=LinearShape.largest_rank)
        if self.rank > narrowest.largest_rank():
            raise ValueError(
                f"rank {self.rank} does not fit {narrowest.path} ({narrowest.in_features} -> {narrowest.out_features}): "
                f"choose a rank up to {narrowest.largest_rank()}"
            )

    @property
    def values_per_layer(self) -> int:
        """The longest layer's number of LoRA values."""
        return max(sum(shape.parameters(self.rank) for shape in layer) for layer in self.layers)

    def memory_tokens(self, hidden_size: int) -> int:
        """How many memory tokens of ``hidden_size`` hold one layer's values: rounded up, the tail is dropped."""
        return math.ceil(self.values_per_layer / hidden_size)

    def cut(self, state: Tensor, *, dtype: torch.dtype | None = None) -> LoRA:
        """Cut a flat state ``[B, L, N]``, ``N >= values_per_layer``, into a LoRA. Values beyond the last linear are dropped.

        Args:
            dtype: of the LoRA, rounded to once all of it is scaled; the state's where none is given.
        """
        assert state.shape[1] == len(self.layers)
        assert state.shape[2] >= self.values_per_layer
        state = (state * math.sqrt(self.scale)).to(dtype)
        weights: dict[str, tuple[Tensor, Tensor]] = {}
        # unbind and split, not indexing: their backward writes each gradient once instead of filling a whole state for each piece.
        for layer, row in zip(self.layers, state.unbind(1), strict=True):
            sizes = [size * self.rank for shape in layer for size in (shape.in_features, shape.out_features)]
            pieces = iter(row.split([*sizes, row.shape[1] - sum(sizes)], dim=1))
            for shape in layer:
                weights[shape.path] = (
                    self._view(next(pieces), shape.in_features, self.rank, rows_first=self.order[0] == "r"),
                    self._view(next(pieces), self.rank, shape.out_features, rows_first=self.order[1] == "l"),
                )
        return LoRA(weights)

    @staticmethod
    def _view(flat: Tensor, rows: int, columns: int, *, rows_first: bool) -> Tensor:
        if rows_first:
            return flat.unflatten(1, (rows, columns))
        return flat.unflatten(1, (columns, rows)).mT
