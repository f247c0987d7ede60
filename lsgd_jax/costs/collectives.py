"""Collectives of a compiled program, parsed from its text: `jax.jit(...).lower(...).compile().as_text()`."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "collective-broadcast", "all-to-all")
"""XLA's collective operations."""


class Collective(NamedTuple):
    """Collective operation of a program."""

    kind: str
    """Name in XLA, one of `KINDS`."""
    bytes: int
    """Size of the whole array that is reduced, gathered or scattered; otherwise of each device's operand."""
    group_size: int
    """Number of devices per group."""
    times: int | None = 1
    """Executions per run of the program, if every enclosing branch is taken; None in a loop of unknown length."""
    conditional: bool = False
    """Whether it is in a branch that may not be taken."""
    senders: int | None = None
    """Number of sending devices, in a permutation that is not a cycle; None: all."""
    within_worker: bool = False
    """Whether it is among the chips of one worker."""

    @property
    def sent(self) -> float:
        """Bytes sent per device per execution, with ring algorithms for reductions, gathers and scatters.

        In a permutation in which some devices don't send, it is the average.
        """
        share = (self.group_size - 1) / self.group_size
        if self.kind == "collective-permute":
            return self.bytes * (1 if self.senders is None else self.senders / self.group_size)
        return (2 if self.kind == "all-reduce" else 1) * share * self.bytes


def collectives(hlo_text: str, chips: int = 1) -> list[Collective]:
    """List the collectives of a compiled program, one entry per instruction and call path.

    Loops count with the trip counts known to the compiler. The stages of an asynchronous collective count as one
    instruction: its start and its end or, on TPUs, the fusions of one channel that a computation has.

    Args:
      hlo_text: text of a compiled program, including its computations.
      chips: devices of each worker, consecutive in the order of the mesh.

    Raises:
      ValueError: if the text has no entry computation.

    Example:
      >>> for each in collectives('''
      ... HloModule example, num_partitions=8
      ... ENTRY %main (x: f32[1000]) -> f32[1000] {
      ...   %x = f32[1000]{0} parameter(0)
      ...   ROOT %sum = f32[1000]{0} all-reduce(%x), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
      ... }'''):
      ...     print(each.kind, each.bytes, each.group_size, each.sent)
      all-reduce 4000 4 6000.0
    """
    computations = _computations(hlo_text)
    if _ENTRY not in computations:
        raise ValueError("this is not the text of a compiled program: it has no ENTRY computation.")
    counts = re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", hlo_text.split("\n\n", 1)[0])
    devices = _Devices(max(map(int, counts), default=1), chips)
    return list(_walk(computations, _ENTRY, devices, 1, conditional=False))


class _Devices(NamedTuple):
    total: int
    of_worker: int


class _Instruction(NamedTuple):
    name: str
    type: str
    operation: str
    rest: str  # Operands and attributes.


_ENTRY = "ENTRY"
# A layout may contain parentheses, `{0:T(128)}`, but none after a space and a lowercase word.
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?(\S+) = (.*?) ([a-z][a-z0-9-]*)\((.*)$")
_HEADER = re.compile(r"^(ENTRY )?%?([^\s(]+) .*\{$")
_SHAPE = re.compile(r"\b(pred|[a-z]+\d+)\w*\[([\d,<=]*)\]")


def _computations(text: str) -> dict[str, list[_Instruction]]:
    computations: dict[str, list[_Instruction]] = {}
    for line in text.splitlines():
        if header := _HEADER.match(line):
            instructions = computations[header[1].strip() if header[1] else header[2]] = []
        elif computations and (found := _INSTRUCTION.match(line)):
            instructions.append(_Instruction(*found.groups()))
    return computations


def _walk(
    computations: dict[str, list[_Instruction]],
    name: str,
    devices: _Devices,
    times: int | None,
    *,
    conditional: bool,
    fused: set[str] | None = None,
) -> Iterator[Collective]:
    """Yield the collectives of a computation; those of a fusion, unless their channels are among `fused` already."""
    instructions, channels = computations.get(name, []), set[str]()
    sizes = {instruction.name: _bytes(instruction.type) for instruction in instructions}
    for instruction in instructions:
        kind = instruction.operation.removesuffix("-start")
        if kind in KINDS:
            channel = re.search(r"\bchannel_id=(\d+)", instruction.rest)
            if fused is not None and channel:
                if channel[1] in fused:
                    continue
                fused.add(channel[1])
            members, senders = _members(instruction.rest, devices.total)
            group_size, workers = len(members), {member // devices.of_worker for member in members}
            operands = re.split(r"\), \w+=", instruction.rest)[0]
            size = sum(sizes[operand] for operand in re.findall(r"%?([\w.-]+)", operands) if operand in sizes)
            whole = size * group_size if kind == "all-gather" else size
            within = devices.of_worker > 1 and len(workers) == 1
            yield Collective(kind, whole, group_size, times, conditional, senders, within)
            continue
        inside = times
        if instruction.operation == "while":
            trips = _trips(computations, instructions, instruction)
            inside = None if times is None or trips is None else times * trips
        branches = instruction.operation == "conditional"
        stages = channels if instruction.operation == "fusion" else None
        for called in re.findall(r"(?:\bcalls|body|condition|to_apply|_computation)=%?([\w.-]+)", instruction.rest):
            yield from _walk(computations, called, devices, inside, conditional=conditional or branches, fused=stages)
        for listed in re.findall(r"branch_computations=\{([^}]*)\}", instruction.rest):
            for called in re.findall(r"[\w.-]+", listed):
                yield from _walk(computations, called, devices, inside, conditional=True)


def _trips(computations: dict[str, list[_Instruction]], caller: list[_Instruction], loop: _Instruction) -> int | None:
    """Trip count of a loop: as annotated by the compiler, or from a counter that runs by ones between two constants."""
    if noted := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest):
        return int(noted[1])
    condition, body = (
        computations.get(called, [])
        for part in ("condition", "body")
        for called in re.findall(rf"\b{part}=%?([\w.-]+)", loop.rest)
    )
    if not condition or not body or condition[-1].operation != "compare" or "direction=LT" not in condition[-1].rest:
        return None
    counter, end = _operands(condition, condition[-1])
    if counter.operation != "get-tuple-element" or end.operation != "constant":
        return None
    [carried] = _operands(caller, loop)
    place = _number("index=", counter.rest)
    start, after = _operands(caller, carried)[place], _operands(body, body[-1])[place]
    if start.operation != "constant" or after.operation != "add":
        return None
    before, step = _operands(body, after)
    by_ones = step.operation == "constant" and _number("", step.rest) == 1
    if before.operation != "get-tuple-element" or _number("index=", before.rest) != place or not by_ones:
        return None
    return max(_number("", end.rest) - _number("", start.rest), 0)


def _operands(instructions: list[_Instruction], instruction: _Instruction) -> list[_Instruction]:
    """Find the instructions that produce an instruction's operands in its computation, looking through copies."""
    by_name = {instruction.name: instruction for instruction in instructions}

    def origin(name: str) -> _Instruction:
        found = by_name[name]
        return origin(_names(found)[0]) if found.operation in ("copy", "bitcast") else found

    return [origin(name) for name in _names(instruction)]


def _names(instruction: _Instruction) -> list[str]:
    operands = re.sub(r"/\*.*?\*/", "", re.split(r"\)(?:, \w+=|$)", instruction.rest)[0])
    return re.findall(r"%?([\w.-]+)(?:,|$)", operands)


def _number(after: str, text: str) -> int:
    [number] = re.findall(rf"(?:^|[ ,)]){after}(-?\d+)", text)[:1]
    return int(number)


def _bytes(shapes: str) -> int:
    """Size in bytes of an array type, or of all arrays in a tuple type."""
    total = 0
    for dtype, dimensions in _SHAPE.findall(shapes):
        bits = 8 if dtype == "pred" else int(dtype.lstrip("abcdefghijklmnopqrstuvwxyz"))
        for dimension in re.findall(r"\d+", dimensions):
            bits *= int(dimension)
        total += -(-bits // 8)
    return total


def _members(rest: str, devices: int) -> tuple[list[int], int | None]:
    """The devices of a group, one of equal ones, and how many of them send, if not all."""
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", rest):
        targets = {int(source): int(target) for source, target in re.findall(r"\{(\d+),(\d+)", pairs[1] + "}")}
        first = next((at for at in targets if at not in targets.values()), next(iter(targets)))
        at, members = first, list[int]()
        while at in targets and at not in members:
            members.append(at)
            at = targets[at]
        return (members, None) if at == first else ([*members, at], len(members))
    # As a reshaped and transposed range.
    if groups := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        shape = [int(n) for n in groups[3].split(",")]
        order = [int(n) for n in groups[4].split(",")] if groups[4] else None
        members = np.arange(math.prod(shape)).reshape(shape).transpose(order).reshape(-1, int(groups[2]))[0].tolist()
        return members, None
    if groups := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return [int(n) for n in groups[1].split(",")], None
    return list(range(devices)), None
