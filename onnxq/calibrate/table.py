"""What a calibration found, with where it came from: saved, loaded, merged, asked for ranges."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from onnxq import __version__
from onnxq.calibrate.one_sided import centered
from onnxq.calibrate.patches import Patches
from onnxq.calibrate.ranges import Range, choose, levels
from onnxq.calibrate.rows import Rows
from onnxq.calibrate.session import one_line
from onnxq.calibrate.statistics import Amax, ChannelAmax, Gram, Histogram, Statistic, make
from onnxq.calibrate.steps import StepAmax
from onnxq.errors import OnnxqError
from onnxq.files import refuse_unreadable, replacing

_FORMAT = 2  # of the file
S = TypeVar("S", bound=Statistic)


@dataclass(frozen=True, order=True)
class DataOrigin:
    """One set of calibration data: what it is, the digest of its rows, how many samples."""

    description: str
    digest: str
    samples: int


@dataclass(frozen=True)
class CalibrationTable:
    """Statistics per tensor: {tensor: {statistic: ...}}.

    Attributes:
        fingerprint: of the model that was calibrated; a table serves no other.
        data: what it was calibrated with, sorted.
        version: of the onnxq that made it.
        notes: what was converted, left out or set on the way.
    """

    fingerprint: str
    statistics: Mapping[str, Mapping[str, Statistic]]
    data: tuple[DataOrigin, ...]
    version: str = __version__
    notes: tuple[str, ...] = ()

    def range(self, tensor: str, method: str = "max", format_name: str = "int8") -> float:
        """The magnitude that the largest code of `tensor` shall stand for; 0.0: it is all zeros.

        Args:
            method: max, percentile, percentile:99.9, entropy, mse, mse:2, steps or steps:80.
            format_name: int8 or fp8: whose codes entropy and mse choose for.

        Raises:
            OnnxqError: the tensor was not calibrated, or not with what the method needs.
        """
        found = self.of(tensor)
        name, _, percent = method.partition(":")
        if name == StepAmax.name:
            return self.by_step(tensor).smallest_mean(float(percent or 100))
        for statistic in found.values():
            if isinstance(statistic, Histogram):
                return choose(statistic, method, format_name)
        for statistic in found.values():
            if isinstance(statistic, Amax) and method == "max":
                return statistic.amax
        raise OnnxqError(
            f"the calibration of {tensor!r} has no histogram, which {method!r} needs",
            "calibrate again with that method, or use max",
        )

    def by_step(self, tensor: str) -> StepAmax:
        """The ranges of `tensor` by denoising step.

        Raises:
            OnnxqError: it was not calibrated for them.
        """
        for statistic in self.of(tensor).values():
            if isinstance(statistic, StepAmax):
                return statistic
        raise OnnxqError(
            f"the ranges of {tensor!r} by denoising step were not calibrated", "calibrate again"
        )

    def peaks(self) -> dict[str, float]:
        """The largest magnitude of every tensor that has its range."""
        return {
            tensor: statistic.amax
            for tensor, found in self.statistics.items()
            for statistic in found.values()
            if isinstance(statistic, Amax)
        }

    def covered(
        self, tensor: str, method: str = "max", format_name: str = "int8", center: bool = False
    ) -> Range:
        """`range`, and what there is to say of it: another middle than 0, channels that are lost.

        Args:
            center: look for another middle.

        Raises:
            OnnxqError: as of `range`.
        """
        peak = self.range(tensor, method, format_name)
        found = Range(peak)
        extremes = next((s for s in self.of(tensor).values() if isinstance(s, Amax)), None)
        middle = centered(extremes, method, format_name) if center and extremes else None
        if middle is not None:
            found = Range(peak, *middle)
        return self.told(tensor, found, format_name)

    def told(self, tensor: str, found: Range, format_name: str = "int8") -> Range:
        """A range, and the share of channels that it loses, where that is known."""
        channels = [s for s in self.of(tensor).values() if isinstance(s, ChannelAmax)]
        if not channels or channels[0].values is None:
            return found
        used = channels[0].values[channels[0].values > 0]
        step = levels(format_name)[1] * (found.reach or found.peak)
        return replace(found, lost=float(np.mean(used < step / 2)) if used.size else 0.0)

    def extremes(self, tensor: str) -> tuple[float, float]:
        """The smallest and the largest value of `tensor`.

        Raises:
            OnnxqError: it was not calibrated for them.
        """
        for statistic in self.of(tensor).values():
            if isinstance(statistic, Amax):
                return statistic.low, statistic.high
        raise OnnxqError(f"the extremes of {tensor!r} were not calibrated", "calibrate again")

    def channels(self, tensor: str, axis: int = -1) -> NDArray[np.float32]:
        """max |x| of each index of `axis`, FP32 [channels].

        Raises:
            OnnxqError: it was not calibrated for them.
        """
        for statistic in self.of(tensor).values():
            if not isinstance(statistic, ChannelAmax) or statistic.axis != axis:
                continue
            if statistic.values is not None:
                return statistic.values
        raise OnnxqError(
            f"the channels of {tensor!r} along axis {axis} were not calibrated", "calibrate again"
        )

    def gram(self, tensor: str) -> NDArray[np.float32]:
        """X^T X / rows over the last axis of `tensor`, FP32 [channels, channels].

        Raises:
            OnnxqError: it was not calibrated for that, or never held a value.
        """
        return self._one(tensor, Gram, "the Gram matrix").matrix

    def moments(self, tensor: str, statistic: str) -> NDArray[np.float32]:
        """X^T X / rows, FP32 [groups, length, length], of what a layer reads of `tensor`.

        Args:
            statistic: `gram`, or `patches:...` of a convolution.

        Raises:
            OnnxqError: it was not calibrated for that, or never held a value.
        """
        found = self.of(tensor).get(statistic)
        if not isinstance(found, (Gram, Patches)):
            raise _not_calibrated("the Gram matrix", tensor)
        return found.matrices

    def rows_seen(self, tensor: str) -> int:
        """How many rows the Gram matrix of a tensor is of; 0 where it has none."""
        found = self.of(tensor).get(Gram.name)
        return found.count if isinstance(found, Gram) else 0

    def rows(self, tensor: str) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Rows of `tensor` [n, channels], and how many of all its rows each stands for [n].

        Raises:
            OnnxqError: it was not calibrated for them, or never held a value.
        """
        return self._one(tensor, Rows, "a choice of the rows").sample

    def halves(self, tensor: str) -> tuple[NDArray[np.bool_], NDArray[np.float32]]:
        """Which half of the data each of `rows` is of [n], and max |x| of each [2, channels].

        Raises:
            OnnxqError: as of `rows`.
        """
        return self._one(tensor, Rows, "a choice of the rows").halves

    def _one(self, tensor: str, kind: type[S], what: str) -> S:
        for statistic in self.of(tensor).values():
            if isinstance(statistic, kind):
                return statistic
        raise _not_calibrated(what, tensor)

    def of(self, tensor: str) -> Mapping[str, Statistic]:
        """All statistics of one tensor.

        Raises:
            OnnxqError: it was not calibrated.
        """
        if tensor not in self.statistics:
            raise OnnxqError(
                f"the calibration table has nothing on {tensor!r}",
                "it was made with another recipe: calibrate again",
            )
        return self.statistics[tensor]

    @property
    def samples(self) -> int:
        """Samples seen, over all data."""
        return sum(origin.samples for origin in self.data)

    @property
    def digest(self) -> str:
        """SHA-256 of the model's fingerprint and all statistics, hexadecimal.

        The same for the same samples, however they were ordered, batched, split and merged; where
        Gram matrices are held, their last bits may differ.
        """
        total = hashlib.sha256(self.fingerprint.encode())
        for tensor, name, key, array in self._arrays():
            total.update(f"{tensor}\0{name}\0{key}\0{array.dtype.str}{array.shape}".encode())
            total.update(np.ascontiguousarray(array).tobytes())
        return total.hexdigest()

    def require(self, fingerprint: str, tensors: Mapping[str, str] | None = None) -> None:
        """Check that this table is the model's, and has what is `watched` (tensor: statistics).

        Raises:
            OnnxqError: it is another model's, or lacks some of it.
        """
        if self.fingerprint != fingerprint:
            raise OnnxqError(
                f"the calibration table is of another model (fingerprint {self.fingerprint}, "
                f"this model's is {fingerprint})",
                "calibrate this model, without --load-calib",
            )
        for tensor, names in (tensors or {}).items():
            lacking = make(names).keys() - self.of(tensor).keys()
            if "amax" in lacking and {"histogram", "steps"} & self.of(tensor).keys():
                lacking -= {"amax"}
            if lacking:
                raise OnnxqError(
                    f"the calibration table lacks the {sorted(lacking)[0]} of {tensor!r}",
                    "it was made with another recipe: calibrate again",
                )

    def merge(self, other: CalibrationTable) -> CalibrationTable:
        """The table of the data of both, as if all of it had been calibrated at once.

        Raises:
            OnnxqError: the tables are of two models, or watched different things.
        """
        if self.fingerprint != other.fingerprint:
            raise OnnxqError(
                f"two calibration tables of different models cannot be merged: fingerprint "
                f"{self.fingerprint} and {other.fingerprint}",
                "merge tables of one model",
            )
        merged: dict[str, dict[str, Statistic]] = {}
        differing = self._watched() ^ other._watched()
        if differing:
            tensor, name = sorted(differing)[0]
            raise OnnxqError(
                f"only one of the two calibration tables has the {name} of {tensor!r}",
                "merge tables made with one recipe",
            )
        for tensor, statistics in self.statistics.items():
            merged[tensor] = make("+".join(statistics))
            for name, statistic in merged[tensor].items():
                statistic.load(statistics[name].arrays())
                statistic.merge(other.statistics[tensor][name])
        notes = [n for n in other.notes if n not in self.notes]
        same = {o.digest for o in self.data} & {o.digest for o in other.data}
        if same:
            notes.append("the merged calibration tables share data, which counts twice now")
        return replace(
            self,
            statistics=merged,
            data=tuple(sorted(self.data + other.data)),
            notes=(*self.notes, *notes),
        )

    def _watched(self) -> set[tuple[str, str]]:
        return {(t, name) for t, statistics in self.statistics.items() for name in statistics}

    def _arrays(self) -> list[tuple[str, str, str, NDArray[Any]]]:
        """(tensor, statistic, key, array) of all of it, sorted."""
        return [
            (tensor, name, key, array)
            for tensor in sorted(self.statistics)
            for name, statistic in sorted(self.statistics[tensor].items())
            for key, array in sorted(statistic.arrays().items())
        ]

    def save(self, path: Path, compressed: bool = True) -> None:
        """Write the table to `path` (.npz, no pickles), atomically; the same table, the same bytes.

        Raises:
            OnnxqError: it cannot be written.
        """
        tensors = sorted(self.statistics)
        head = {
            "format": _FORMAT,
            "version": self.version,
            "fingerprint": self.fingerprint,
            "data": [asdict(origin) for origin in self.data],
            "notes": list(self.notes),
            "tensors": {t: sorted(self.statistics[t]) for t in tensors},
        }
        arrays: dict[str, Any] = {  # all of numbers: nothing is pickled
            "table": np.frombuffer(json.dumps(head).encode(), np.uint8)
        }
        for tensor, name, key, array in self._arrays():
            arrays[f"{tensors.index(tensor)}.{name}.{key}"] = array
        with replacing(path) as (temporary,), temporary.open("wb") as stream:
            (np.savez_compressed if compressed else np.savez)(stream, **arrays)


def _not_calibrated(what: str, tensor: str) -> OnnxqError:
    return OnnxqError(
        f"{what} of {tensor!r} was not calibrated", "calibrate again with this recipe"
    )


def load_table(path: Path, fingerprint: str | None = None) -> CalibrationTable:
    """A saved table; with `fingerprint`, only if it is that model's.

    Raises:
        OnnxqError: missing, damaged, no table, of a newer onnxq, or of another model.
    """
    refuse_unreadable(path, "the calibration table", "give a file that --save-calib wrote")
    try:
        with np.load(path, allow_pickle=False) as archive:
            head = json.loads(archive["table"].tobytes())
            if head["format"] != _FORMAT:
                raise OnnxqError(
                    f"{path} is a calibration table of onnxq {head['version']}, in a form that "
                    f"{__version__} does not read",
                    "calibrate again, or update onnxq",
                )
            statistics, entries = {}, defaultdict(list)
            for key in archive.files:
                entries[key.partition(".")[0]].append(key)
            for index, (tensor, names) in enumerate(head["tensors"].items()):
                statistics[tensor] = make("+".join(names))
                for name, statistic in statistics[tensor].items():
                    prefix = f"{index}.{name}."
                    keys = [k for k in entries[str(index)] if k.startswith(prefix)]
                    statistic.load({k.removeprefix(prefix): archive[k] for k in keys})
            table = CalibrationTable(
                fingerprint=str(head["fingerprint"]),
                statistics=statistics,
                data=tuple(DataOrigin(**origin) for origin in head["data"]),
                version=str(head["version"]),
                notes=tuple(head["notes"]),
            )
    except OnnxqError:
        raise
    except Exception as error:  # numpy's, zipfile's and json's for damaged files, of any kind
        raise OnnxqError(
            f"{path} cannot be read as a calibration table: {one_line(error)}",
            "give a file that --save-calib wrote",
        ) from error
    if fingerprint is not None:
        table.require(fingerprint)
    return table
