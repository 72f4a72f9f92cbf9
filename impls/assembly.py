"""Read the assembly that the compiler made, NVIDIA's SASS and AMD's GCN: kinds of instructions, and where it loops."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, fields

SASS_LINE = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(@!?U?P[T0-9]+\s+)?([A-Z][A-Z0-9_.x]*)([^;]*);\s*/\* 0x[0-9a-f]+ \*/")
SASS_REST = re.compile(r"^\s+/\* 0x([0-9a-f]{16}) \*/\s*$")
SASS_LABEL = re.compile(r"^(\.L_x_\d+):")
GCN_LINE = re.compile(r"^\t([a-z][a-z0-9_]+)(.*)$")
GCN_LABEL = re.compile(r"^(\.LBB\d+_\d+):")
GCN_DATA = ("amdhsa", "amdgpu")
BRANCHES = ("BRA", "s_branch", "s_cbranch")
ENDS = ("EXIT", "RET", "s_endpgm")


@dataclass(frozen=True)
class Instruction:
    """One instruction: the opcode with its modifiers, its operands, and the control word of SASS (0 elsewhere)."""

    opcode: str
    operands: str
    conditional: bool = False
    control: int = 0


@dataclass(frozen=True)
class Counts:
    """Count what a run of instructions holds, each counted once however often it runs; all per warp."""

    instructions: int = 0
    tensor: int = 0
    """Instructions of the matrix units."""
    products: int = 0
    """Multiply-adds of those in units of 16-bit operands: tf32 counts twice, float32 eight times."""
    special: int = 0
    """Exponentials, logarithms, reciprocals, roots."""
    barrier: int = 0
    local: int = 0
    """Loads and stores of spilled registers."""
    shared: int = 0
    wavefronts: int = 0
    """Passes of 128 bytes through shared memory that its instructions take where no banks collide."""
    global_: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        """Add count by count."""
        return Counts(*(getattr(self, x.name) + getattr(other, x.name) for x in fields(self)))


@dataclass(frozen=True)
class Code:
    """The instructions of one kernel in order, and those of its longest loop, with all that is nested in it."""

    instructions: tuple[Instruction, ...]
    loop: tuple[Instruction, ...]


def sass(text: str) -> Code:
    """Parse what `nvdisasm -hex` prints of a cubin; tables of bytes beside the code are left out."""
    found, labels = [], {}
    for line in text.splitlines():
        if match := SASS_LINE.match(line):
            # BRA.U UP0, `(label)` has its condition among the operands
            conditional = match[1] is not None or match[2].startswith("BRA") and not match[3].strip().startswith("`")
            found.append((match[2], match[3], conditional, 0))
        elif found and (match := SASS_REST.match(line)):
            found[-1] = (*found[-1][:-1], int(match[1], 16) >> 41)
        elif match := SASS_LABEL.match(line):
            labels[match[1]] = len(found)
    return _code([Instruction(*x) for x in found], labels)


def gcn(text: str) -> Code:
    """Parse the amdgcn assembly of a kernel; directives and metadata are left out."""
    found, labels = [], {}
    for line in text.partition(".section\t.rodata")[0].splitlines():
        if match := GCN_LABEL.match(line):
            labels[match[1]] = len(found)
        elif (match := GCN_LINE.match(line)) and not match[1].startswith(GCN_DATA):
            conditional = match[1].startswith("s_cbranch")
            found.append(Instruction(match[1], match[2].partition(";")[0], conditional))
    return _code(found, labels)


def _code(found: list[Instruction], labels: dict[str, int]) -> Code:
    """Find the longest loop: the largest set of blocks that all reach each other."""
    leaves = [i + 1 for i, x in enumerate(found) if x.opcode.startswith(BRANCHES + ENDS)]
    starts = sorted({0, *labels.values(), *leaves} & set(range(len(found))))
    ends = [*starts[1:], len(found)]
    index = {start: i for i, start in enumerate(starts)}
    reach = [_followers(found, labels, index, end) for end in ends]
    for middle in range(len(starts)):
        for i in range(len(starts)):
            if reach[i] >> middle & 1:
                reach[i] |= reach[middle]
    loops = {tuple(j for j in range(len(starts)) if reach[i] >> j & 1 and reach[j] >> i & 1) for i in index.values()}
    bodies = [tuple(x for j in loop for x in found[starts[j] : ends[j]]) for loop in sorted(loops)]
    # a block of one instruction that branches to itself is the trap behind the end of SASS
    return Code(tuple(found), max((body for body in bodies if len(body) > 1), key=len, default=()))


def _followers(found: list[Instruction], labels: dict[str, int], index: dict[int, int], end: int) -> int:
    """Return the blocks that may follow the one that ends before instruction `end`, one bit each."""
    last, bits = found[end - 1], 0
    if last.opcode.startswith(BRANCHES) and (target := re.search(r"\.L\w+", last.operands)):
        bits |= 1 << index.get(labels.get(target[0], -1), len(index))
    if last.conditional or not last.opcode.startswith(BRANCHES + ENDS):
        bits |= 1 << index.get(end, len(index))
    return bits


SASS_KINDS = {
    "tensor": re.compile(r"[HIQD]G?MMA|UTC\w*MMA|OMMA"),
    "special": re.compile(r"MUFU"),
    "barrier": re.compile(r"BAR"),
    "local": re.compile(r"LDL|STL"),
    "shared": re.compile(r"LDS|STS|LDSM|STSM|ATOMS"),
    "global_": re.compile(r"LDG|STG|LDGSTS|LDGDEPBAR|RED|ATOMG|UTMA"),
}
GCN_KINDS = {
    "tensor": re.compile(r"v_s?mfma"),
    "special": re.compile(r"v_(exp|log|rcp|rsq|sqrt)_"),
    "barrier": re.compile(r"s_barrier"),
    "local": re.compile(r"scratch_"),
    "shared": re.compile(r"ds_(?!bpermute|permute|swizzle)"),
    "global_": re.compile(r"global_|buffer_(load|store)|flat_(load|store)"),
}


def counts(code: Iterator[Instruction] | tuple[Instruction, ...], nvidia: bool) -> Counts:
    """Count instructions by kind."""
    found = dict.fromkeys((x.name for x in fields(Counts)), 0)
    for instruction in code:
        found["instructions"] += 1
        kind = kind_of(instruction, nvidia)
        if kind:
            found[kind] += 1
        if kind == "tensor":
            found["products"] += products(instruction)
        elif kind == "shared":
            found["wavefronts"] += _wavefronts(instruction, nvidia)
    return Counts(**found)


def kind_of(instruction: Instruction, nvidia: bool) -> str | None:
    """Return which field of `Counts` an instruction belongs to, None where to none but instructions.

    LDGSTS copies from global to shared memory and is counted as global; LDGDEPBAR only closes a group of them.
    """
    opcode = instruction.opcode
    if opcode.startswith("LDGDEPBAR"):
        return None
    kinds = SASS_KINDS if nvidia else GCN_KINDS
    if opcode.startswith("LDGSTS"):
        return "global_"
    return next((kind for kind, pattern in kinds.items() if pattern.match(opcode)), None)


def products(instruction: Instruction) -> int:
    """Return the multiply-adds that one warp does in one matrix instruction, in units of 16-bit operands.

    HMMA.16816 is 16 x 8 x 16; a warp does its quarter of HGMMA.64xNxK; v_mfma_f32_MxNxK has K per block. Sizes of
    Blackwell's tensor memory instructions stand in a descriptor and not in the code: they count as 0.
    """
    opcode = instruction.opcode
    if match := re.match(r"HGMMA\.64x(\d+)x(\d+)", opcode):
        return 16 * int(match[1]) * int(match[2]) * (2 if "TF32" in opcode else 1)
    if match := re.match(r"HMMA\.(1688|16816|1684)", opcode):
        return {"1684": 4, "1688": 8, "16816": 16}[match[1]] * 16 * 8 * (2 if "TF32" in opcode else 1)
    if match := re.match(r"v_mfma_f(?:32|64)_(\d+)x(\d+)x(\d+)", opcode):
        full = opcode.endswith(("f32", "_f64")) and "xf32" not in opcode
        return int(match[1]) * int(match[2]) * int(match[3]) * (8 if full else 1)
    return 0


def _wavefronts(instruction: Instruction, nvidia: bool) -> int:
    if nvidia:
        matrices = re.search(r"\.M88\.(\d)|MT88\.(\d)", instruction.opcode)
        if matrices:
            return int(matrices[1] or matrices[2])
        width = re.search(r"\.(64|128)(?![0-9])", instruction.opcode)
        return int(width[1]) // 32 if width else 1
    width = re.search(r"_b(\d+)$", instruction.opcode)
    pair = 2 if "2" in instruction.opcode.split("_")[1] else 1
    return max(1, int(width[1]) // 16 if width else 2) * pair
