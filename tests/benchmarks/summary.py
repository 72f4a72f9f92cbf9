"""Say what a run of the benchmarks found, in one table, and how it stands beside the baseline of the machine."""

from collections.abc import Sequence

from baselines import FEWER, LIMIT, NEW, NOISE, REGRESSION, Baseline, Change, Peer
from rich.table import Table

COLUMNS = ("benchmark", "ours", "quartiles", "peer", "its figure", "ratio", "beside the baseline")
HOW = f"""\
compared are ratios to the first peer, taken within common rounds, where both runs have it, else medians; REGRESSION:
more than {LIMIT:.0%} worse, and the quartiles of the two runs apart (else: within noise)"""


def table(changes: Sequence[Change]) -> Table:
    """Return one row for every benchmark, and one for each further peer; the ratio: how many times quicker ours is."""
    made = Table(*COLUMNS, title=None)
    for x in changes:
        ours, first = x.row.ours, x.row.peers[:1]
        quartiles = f"{_short(ours.low)} .. {_short(ours.high)}" if ours.count > 1 else ""
        made.add_row(x.row.name, f"{_short(ours.median)} {x.row.unit}", quartiles, *_peer(first), beside(x))
        for peer in x.row.peers[1:]:
            made.add_row("", "", "", *_peer((peer,)), "")
    return made


def _peer(peers: Sequence[Peer]) -> tuple[str, str, str]:
    if not peers:
        return "", "", ""
    [peer] = peers
    return peer.name, _short(peer.theirs.median), _short(peer.ratio.median)


def beside(x: Change) -> str:
    """Say in words how a benchmark stands beside its baseline."""
    if x.verdict in (NEW, FEWER):
        return x.verdict
    size = f"{abs(x.slower):.0%}"
    said = "as before" if size == "0%" else f"{size} worse" if x.slower > 0 else f"{size} better"
    return f"{said}: {x.verdict}" if x.verdict in (NOISE, REGRESSION) else said


def details(found: dict) -> list[str]:
    """Return the lines of what is no benchmark but says what they mean: the machine's rates, the tuner's memory."""
    named = {"machine": found.get("machine")} | {x: found.get("tuner", {}).get(x) for x in ("largest_process_MiB",)}
    return [f"{name}: " + ", ".join(f"{key} {x:,.4g}" for key, x in of.items()) for name, of in named.items() if of]


def verdict(changes: Sequence[Change], baseline: Baseline, versions: dict) -> list[str]:
    """Return what there is to say of all changes together; nothing where no baseline was asked for."""
    if not baseline.path.name:
        return []
    if not baseline.rows:
        return [f"{baseline.path}: no baseline of this machine so far"]
    worse = [x for x in changes if x.verdict == REGRESSION]
    lines = [f"{REGRESSION}: {x.row.name} is {x.slower:.0%} worse than the baseline by its {x.by}" for x in worse]
    compared = sum(x.verdict not in (NEW, FEWER) for x in changes)
    about, before = f"baseline of {baseline.about['date'][:10]}, {baseline.path}", baseline.about["versions"]
    others = [f"{name} {before.get(name)} then, {x} now" for name, x in versions.items() if before.get(name) != x]
    lines += [f"{len(worse)} regressions in {compared} benchmarks; {about}", HOW]
    return lines + [f"other versions: {', '.join(others)}"] * bool(others)


def _short(x: float) -> str:
    return f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}"
