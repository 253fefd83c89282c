"""Instructions of a GPU kernel's machine code (SASS), counted along its control flow."""

from __future__ import annotations

import heapq
import re
from dataclasses import dataclass, field
from itertools import pairwise

# What computes the products of a main loop, the best first.
PRODUCTS = ("HGMMA", "HMMA", "FFMA")
LABEL = re.compile(r"^(\.L_\w+):")
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)(\S*)\s*(.*)$")


@dataclass
class Piece:
    """Instructions that run one after another, and the pieces that can follow."""

    opcodes: list[str] = field(default_factory=list)
    ways: set[int] = field(default_factory=set)  # none: the kernel ends here


def instructions(text: str) -> tuple[int, int]:
    """(instructions of one turn of the main loop, all others of a tile) on the shortest way.

    text: what `nvdisasm -c` prints of one kernel. ValueError where there is no main loop.
    """
    pieces = parse(text)
    product = _product(pieces)
    turn = shortest_way(pieces, product, {product})
    if turn is None:
        raise ValueError("no loop around the products")

    # Without its way back the loop is passed through once, to the next tile or to the end.
    for piece, following in pairwise(turn):
        if following <= piece:
            pieces[piece].ways.discard(following)
    n_turn = _size(pieces, turn[1:])
    tile = shortest_way(pieces, product, {product})
    if tile is not None:
        return n_turn, _size(pieces, tile[1:]) - n_turn

    ends = {i for i, piece in enumerate(pieces) if not piece.ways}
    before, after = shortest_way(pieces, 0, {product}), shortest_way(pieces, product, ends)
    if before is None or after is None:
        raise ValueError("no way from the entry through the main loop to the end")
    return n_turn, _size(pieces, before) + _size(pieces, after[1:]) - n_turn


def parse(text: str) -> list[Piece]:
    """The kernel's pieces in the order of addresses; the first is the entry."""
    pieces = [Piece()]
    labels: dict[str, int] = {}
    targets: list[tuple[int, str]] = []
    for line in text.splitlines():
        label, instruction = LABEL.match(line), INSTRUCTION.match(line)
        if label:
            pieces.append(Piece())
            labels[label[1]] = len(pieces) - 1
            pieces[-2].ways.add(len(pieces) - 1)
        if not instruction:
            continue

        condition, opcode, _, operands = instruction.groups()
        pieces[-1].opcodes.append(opcode)
        # CALL without a return address is a jump to code that was moved out of the way.
        if opcode in ("BRA", "EXIT", "CALL"):
            # A branch may name its condition before it or among its operands.
            conditional = bool(condition) or bool(re.match(r"!?U?P\d", operands))
            target = re.search(r"`\((\.L_\w+)\)", operands)
            if target:
                targets.append((len(pieces) - 1, target[1]))
            pieces.append(Piece())
            if conditional:
                pieces[-2].ways.add(len(pieces) - 1)

    for position, name in targets:
        pieces[position].ways.add(labels[name])
    return pieces


def _product(pieces: list[Piece]) -> int:
    """The first piece with a product of the best kind there is."""
    for opcode in PRODUCTS:
        for i, piece in enumerate(pieces):
            if opcode in piece.opcodes:
                return i
    raise ValueError(f"no instruction of {', '.join(PRODUCTS)}")


def _size(pieces: list[Piece], way: list[int]) -> int:
    return sum(len(pieces[i].opcodes) for i in way)


def shortest_way(pieces: list[Piece], start: int, goals: set[int]) -> list[int] | None:
    """The pieces from start to a goal with the fewest instructions, at least one step; or None."""
    queue: list[tuple[int, list[int]]] = [(0, [start])]
    visited: set[int] = set()
    while queue:
        length, way = heapq.heappop(queue)
        if len(way) > 1:
            if way[-1] in goals:
                return way
            if way[-1] in visited:
                continue
            visited.add(way[-1])
        for following in pieces[way[-1]].ways:
            step = len(pieces[following].opcodes)
            heapq.heappush(queue, (length + step, [*way, following]))
    return None
