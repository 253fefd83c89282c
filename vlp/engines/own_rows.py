"""What a rank takes of a checkpoint's tensors where parameters are sharded: its own rows, and no
others are read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from vlp.pretrained.parts import rows_of, shape_of


class OwnRows(Mapping[str, Tensor]):
    """An optimiser's stored tensors by "KEY.PARAMETER": DTensors where they have the form of a
    sharded parameter, of which only the rank's rows are read, when they are asked for.
    """

    def __init__(self, stored: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
        self.stored, self.parameters = stored, parameters

    def __getitem__(self, name: str) -> Tensor:
        parameter = self.parameters.get(name.partition(".")[2])
        if not isinstance(parameter, DTensor) or parameter.placements != (Shard(0),):
            return self.stored[name]
        if shape_of(self.stored, name) != tuple(parameter.shape):
            return self.stored[name]

        begin, end = bounds(parameter)
        return DTensor.from_local(
            rows_of(self.stored, name, begin, end),
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)


def elements_of(stored: Mapping[str, Tensor], name: str, begin: int, end: int) -> Tensor:
    """Elements [begin, end) of a tensor, counted row after row, as far as it has so many; only the
    rows in which they lie are read.
    """
    shape = shape_of(stored, name)
    if not shape:
        return stored[name].reshape(1)[begin:end]

    n_of_row = math.prod(shape[1:])
    end = min(end, shape[0] * n_of_row)
    if begin >= end:
        return stored[name].new_empty(0)
    first_row, last_row = begin // n_of_row, -(-end // n_of_row)
    elements = rows_of(stored, name, first_row, last_row).flatten()
    skipped = first_row * n_of_row
    return elements[begin - skipped : end - skipped]


def bounds(parameter: DTensor) -> tuple[int, int]:
    """This rank's first row of a parameter that is cut by rows, and the one after its last: in
    pieces of equal length, of which the last ones may be shorter or empty.
    """
    mesh, n_rows = parameter.device_mesh, len(parameter)
    n_of_piece = -(-n_rows // mesh.size())
    begin = min(mesh.get_local_rank() * n_of_piece, n_rows)
    return begin, min(begin + n_of_piece, n_rows)
