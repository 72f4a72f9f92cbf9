"""The paper's claims beside what files of results say: its place, its figure, ours, on what; or "not measured".

The paper is the technical report of Kimi Linear. A claim that needs a trained model, or a GPU that nobody had, stays
"not measured": nothing is estimated here, and a figure at other sizes says so.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from reports import load
from reports.figure import short
from reports.load import RECORDS, Result

MISSING = "not measured"
YARDSTICK, MODEL, COLLECTED = "yardstick", "model prefill and decode", "collected"
HEAD, CHUNK = 128, 64
"""The paper's head dimension and chunk length."""
MLA, HYBRID, GDN = "mla", "hybrid", "gdn-hybrid"
LONG = {"512K": 1 << 19, "1M": 1 << 20}
OF_MANY = "step of many"
"""The milliseconds of a step over the sequences that it takes on."""
FORMS, OBJECTIVES = "forms of table 6", "objectives of table 7"
"""Steps of a collection that run the definition's tests."""
PERIOD = 4
"""Layers of which one is MLA, the others KDA."""


@dataclass(frozen=True)
class Row:
    """One claim on one device."""

    claim: str
    place: str
    paper: str
    ours: str = MISSING
    device: str = ""
    source: str = ""
    """The file, with its date."""


@dataclass(frozen=True)
class Claim:
    """One claim of the paper, and how to find ours in a result; None where that result does not say."""

    text: str
    place: str
    paper: str
    kind: str
    ours: Callable[[Result], str | None]


def flops_kda(T: int, d: int = HEAD, C: int = CHUNK) -> int:
    """Return equation 13, the FLOPs of one head of KDA."""
    return 6 * T * d**2 + 3 * T * C * d + T * C**2


def flops_attention(T: int, d: int = HEAD) -> int:
    """Return equation 14, the dominant FLOPs of one head of full attention."""
    return 2 * T**2 * d


def _tokens(T: int) -> str:
    return f"{T // 1024}k" if T % 1024 == 0 else f"{T:,}"


def timed(result: Result) -> str | None:
    """Return the time of general DPLR over KDA's at each length."""
    data = result.data
    clock = {x["T"]: short(x["dplr_over_kda"]["median"]) for x in data["timed"]}
    if not clock:
        return None
    said = [f"{clock[x['T']]} at {_tokens(x['T'])}" for x in data["counted"] if x["T"] in clock]
    missing = [_tokens(x["T"]) for x in data["counted"] if x["T"] not in clock]
    heads = f"; {data['heads']} heads, {data['timed'][0]['dtype']}"
    return ", ".join(said) + (f"; not measured at {', '.join(missing)}" if missing else "") + heads


def counted(of: str) -> Callable[[Result], str]:
    """Return what says how many times more general DPLR needs, at the first and the last length."""

    def ours(result: Result) -> str:
        rows = result.data["counted"]
        ends = dict.fromkeys((rows[0]["T"], rows[-1]["T"])) if rows else {}
        by = {x["T"]: x[of]["dplr_over_kda"] for x in rows}
        return ", ".join(f"{short(by[T])} at {_tokens(T)}" for T in ends) or None

    return ours


def launches(result: Result) -> str | None:
    """Return the launches of both."""
    rows = result.data["counted"]
    return f"{rows[-1]['launches']['dplr']} and {rows[-1]['launches']['kda']}" if rows else None


def _ours_a_head(result: Result) -> tuple[int, float] | None:
    rows = result.data["counted"]
    return (rows[-1]["T"], rows[-1]["flops"]["kda"] / result.data["heads"]) if rows else None


def equation_13(result: Result) -> str | None:
    """Return our count of FLOPs over equation 13's."""
    if not (found := _ours_a_head(result)):
        return None
    T, flops = found
    over = f"{short(flops / flops_kda(T))} times that, tree form in chunks of 16, all FLOPs"
    return f"{flops / T:,.0f} a token; {over}"


def equation_14(result: Result) -> str | None:
    """Return equation 14 over our count at the longest length."""
    if not (found := _ours_a_head(result)):
        return None
    T, flops = found
    return f"at {_tokens(T)} tokens {short(flops_attention(T) / flops)} times our counted KDA"


def _by_context(result: Result, field: str) -> dict[str, dict[int, float]]:
    """Return a figure of every model by context, of rows that have it: of one sequence, or OF_MANY."""
    found: dict[str, dict[int, float]] = {}
    for row in result.data["rows"]:
        if field == OF_MANY and _many(result):
            found.setdefault(row["model"], {})[row["context"]] = row["step_ms"] / row["batch"]
        elif field in row and not _many(result):
            found.setdefault(row["model"], {})[row["context"]] = row[field]
    return found


def _many(result: Result) -> bool:
    """Tell whether as many sequences were decoded as a memory holds."""
    return result.data["arguments"].get("cache_gib", "None") != "None"


def _growth(result: Result) -> dict[str, float] | None:
    """Return the bytes of cache that a token adds, by model; None without two lengths of both, or at another ratio."""
    found = _by_context(result, "cache_bytes")
    if result.data["arguments"].get("ratio", "None") != "None" or any(
        len(found.get(name, {})) < 2 for name in (HYBRID, MLA)
    ):
        return None
    return {
        name: (sizes[max(sizes)] - sizes[min(sizes)]) / (max(sizes) - min(sizes))
        for name, sizes in found.items()
        if len(sizes) > 1
    }


def cache_cut(result: Result) -> str | None:
    """Return how much less cache the hybrid takes than MLA, a token, and in all at the longest context."""
    if not (growth := _growth(result)):
        return None
    sizes = _by_context(result, "cache_bytes")
    longest = max(sizes[MLA].keys() & sizes[HYBRID].keys())
    whole = 1 - sizes[HYBRID][longest] / sizes[MLA][longest]
    return f"{1 - growth[HYBRID] / growth[MLA]:.1%} a token; {whole:.1%} at {_tokens(longest)} with the states"


def fixed_state(result: Result) -> str | None:
    """Return the bytes that a token adds to the KDA layers, which are what MLA's share does not explain."""
    layers = result.data["arguments"].get("layers", "")
    if not (growth := _growth(result)) or not layers.isdecimal() or int(layers) % PERIOD:
        return None
    return f"{growth[HYBRID] - growth[MLA] / PERIOD:g} bytes a token in KDA layers"


def _about(result: Result) -> Iterator[str]:
    """Yield the model and the conditions of a benchmark."""
    asked = result.data["arguments"]
    yield asked.get("preset", "checkpoint")
    yield f"{asked.get('layers', 'all')} layers"
    if asked.get("filled") == "True":
        yield "a drawn cache"
    if asked.get("piece", "0") != "0":
        yield f"a piece of {asked['piece']} tokens"
    if _many(result):
        yield f"caches of {asked['cache_gib']} GiB together"


def over_hybrid(other: str, field: str, asked: dict[str, int]) -> Callable[[Result], str | None]:
    """Return what says how many times longer another model takes: at the lengths asked for, else at the longest."""

    def ours(result: Result) -> str | None:
        times = _by_context(result, field)
        both = times.get(other, {}).keys() & times.get(HYBRID, {}).keys()
        if not both:
            return None
        ratio = {T: short(times[other][T] / times[HYBRID][T]) for T in both}
        said = [f"{ratio[T]} at {name}" for name, T in asked.items() if T in ratio]
        if missing := [name for name, T in asked.items() if T not in ratio]:
            said += [f"{ratio[max(both)]} at {_tokens(max(both))}", f"{MISSING} at {' and '.join(missing)}"]
        return ", ".join(said) + f" ({', '.join(_about(result))})"

    return ours


def judged(*names: str, targets: str = "") -> Callable[[Result], str | None]:
    """Return what says what the judge found of properties, on targets that have a word in their names."""

    def ours(result: Result) -> str | None:
        lines = [x for x in result.data if x["kind"] in ("case", "failure") and targets in x["target"]]
        failed = sorted({x["target"] for x in lines if x["kind"] == "failure" and x["property"].split("@")[0] in names})
        found = [
            (x["target"], float(outcome["ratio"]))
            for x in lines
            if x["kind"] == "case"
            for name, outcome in x["results"].items()
            if name.split("@")[0] in names
        ]
        failed = sorted({*failed, *(target for target, ratio in found if not ratio <= 1)})
        if failed:
            return f"COUNTEREXAMPLE: {', '.join(failed)}"
        if not found:
            return None
        judged, worst = ", ".join(dict.fromkeys(target for target, _ in found)), max(ratio for _, ratio in found)
        return f"no counterexample in {len(found)} checks, at most {worst:.2f} of the limit: {judged}"

    return ours


def tested(step: str, means: str) -> Callable[[Result], str | None]:
    """Return what says that the tests of the definition passed when they were collected."""

    def ours(result: Result) -> str | None:
        found = result.data["steps"].get(step)
        if not found or found["outcome"] == "cut off":
            return None
        return means if found["code"] == 0 else "its tests FAIL"

    return ours


CLAIMS = (
    Claim(
        "General DPLR's kernel takes longer than KDA's, 2k to 64k tokens", "Figure 2; sections 3.2, 6.2",
        "nearly 2 times", YARDSTICK, timed,
    ),
    Claim(
        "... its FLOPs over KDA's", "sections 3.2, 6.2", "four matrices instead of two, about three products more",
        YARDSTICK, counted("flops"),
    ),
    Claim("... the bytes it moves over KDA's", "section 6.2", "no figure", YARDSTICK, counted("bytes")),
    Claim("... launches of DPLR and of KDA", "section 6.2", "no figure", YARDSTICK, launches),
    Claim(
        "FLOPs of a head of KDA, C = 64, d = 128", "section 6.3, equation 13", f"{flops_kda(1):,} a token",
        YARDSTICK, equation_13,
    ),
    Claim("FLOPs of a head of full attention", "section 6.3, equation 14", "2 T^2 d", YARDSTICK, equation_14),
    Claim("The KV cache is smaller than MLA's", "abstract; section 1", "up to 75%", MODEL, cache_cut),
    Claim("The state of KDA has a fixed size", "section 6.3", "d_k x d_v a head", MODEL, fixed_state),
    Claim(
        "Prefill of MLA over Kimi Linear's, batch 1", "Figure 7a; section 5.6", "2.3 at 512K, 2.9 at 1M",
        MODEL, over_hybrid(MLA, "prefill_s", LONG),
    ),
    Claim(
        "... of a piece of a prompt behind so many tokens", "Figure 7a", "no figure",
        MODEL, over_hybrid(MLA, "piece_s", LONG),
    ),
    Claim(
        "A decoding step of MLA over Kimi Linear's, batch 1", "Figure 7b",
        "1.8 at 512K, 2.2 at 1M (section 6.3 says 2.3)", MODEL, over_hybrid(MLA, "step_ms", LONG),
    ),
    Claim(
        "... with the batches that memory allows", "Figure 1b", "4.8 at 256K, 5.7 at 512K, 6.3 at 1M",
        MODEL, over_hybrid(MLA, OF_MANY, {"256K": 1 << 18} | LONG),
    ),
    Claim(
        "A decoding step of the GDN hybrid over Kimi Linear's", "Figures 1b, 7b", "about 1",
        MODEL, over_hybrid(GDN, "step_ms", LONG),
    ),
    Claim(
        "Prefill of the GDN hybrid over Kimi Linear's", "Figure 7a", "about 1",
        MODEL, over_hybrid(GDN, "prefill_s", LONG),
    ),
    Claim(
        "Without positions MLA is multi-query attention over latents", "section 4", "equal",
        RECORDS, judged("absorbed"),
    ),
    Claim(
        "KDA is general DPLR with a = beta k, b = k exp(g)", "section 6.2", "equal",
        RECORDS, judged("dplr_equality"),
    ),
    Claim(
        "The chunkwise form equals the recurrence", "equations 6 to 9", "equal",
        RECORDS, judged("reference_forward", "chunk_invariance", targets="chunk"),
    ),
    Claim(
        "KDA with one gate a head is Gated DeltaNet, without a gate DeltaNet", "section 2.2; Table 7", "equal",
        RECORDS, judged("deltanet", "gated_deltanet"),
    ),
    Claim(
        "The parallel form of equation 12", "Table 6", "equal", COLLECTED,
        tested(FORMS, "equal in float64, in equation 1's order and with its beta, which equation 12 prints otherwise"),
    ),
    Claim(
        "Every rule is a step on its objective", "Table 7", "11 members", COLLECTED,
        tested(OBJECTIVES, "11 members; as printed Longhorn's, Comba's and RWKV7's hold in special cases only"),
    ),
)  # fmt: skip


def rows(results: list[Result]) -> list[Row]:
    """Return a row for every claim and device that says something of it, else one without.

    Of a device's results the newest counts, among those that were measured where the paper was, where there are any.
    """
    return [row for claim in CLAIMS for row in _rows(claim, results)]


def _rows(claim: Claim, results: list[Result]) -> Iterator[Row]:
    about = claim.text, claim.place, claim.paper
    found: dict[str, list[tuple[bool, str, Row]]] = {}
    for result in results:
        if result.kind == claim.kind and (ours := claim.ours(result)) is not None:
            origin, date = result.origin, result.origin.date or ""
            row = Row(*about, ours, origin.device, f"{origin.file}, {date[:10] or 'date not recorded'}")
            found.setdefault(origin.device, []).append((MISSING not in ours, date, row))
    yield from (max(rows, key=lambda x: x[:2])[2] for rows in found.values()) if found else (Row(*about),)


def configure(p: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    p.add_argument("results", nargs="*", type=Path, metavar="RESULTS", help="files or folders (default results)")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the claims; returns the exit code."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    found = rows(load.read(args.results or [Path("results")]))
    laid = Table("claim", "in the paper", "paper", "ours", "device", "from", show_lines=True)
    for row in found:
        laid.add_row(*(Text(cell) for cell in asdict(row).values()))
    console = Console()
    (console if console.is_terminal else Console(width=200)).print(laid)
    return 0
