"""Ours stands beside the paper's figure only where a file says it; elsewhere it says "not measured"."""

import example_results as examples
import pytest

from reports import claims, load
from reports.__main__ import main

COLLECTED = {
    "schema": 1, "kind": "collected", "begun": examples.DATE, "updated": examples.DATE, "device": "cpu",
    "machine": "A CPU", "sources": "0" * 16, "minutes": 1,
}  # fmt: skip


def said(folder, *documents) -> dict[str, str]:
    """Return what stands beside each claim, by the first words of the claim."""
    paths = [examples.lines(folder / f"{i}.jsonl", *x) for i, x in enumerate(documents)]
    return {row.claim: row.ours for row in claims.rows(load.read(paths))}


def one(found: dict[str, str], start: str) -> str:
    [ours] = [ours for claim, ours in found.items() if claim.startswith(start)]
    return ours


def test_without_results_nothing_is_measured():
    rows = claims.rows([])
    assert {row.ours for row in rows} == {claims.MISSING} and len(rows) == len(claims.CLAIMS) >= 19
    assert all(row.place and row.paper for row in rows)


def test_equations_are_the_papers():
    assert claims.flops_kda(64, d=128, C=64) == 6 * 64 * 128**2 + 3 * 64 * 64 * 128 + 64 * 64**2
    assert claims.flops_attention(1024, d=128) == 2 * 1024**2 * 128


def test_the_yardstick_says_what_was_timed_and_what_was_not(tmp_path):
    found = said(tmp_path, [examples.yardstick()])
    assert one(found, "General DPLR") == "2 at 2k; not measured at 64k; 16 heads, float32"
    assert one(found, "... its FLOPs") == "1.4 at 2k, 1.4 at 64k"
    assert one(found, "... launches") == "2 and 2"


def test_the_cache_of_a_token_is_told_from_that_of_the_states(tmp_path):
    found = said(tmp_path, [examples.model()])
    # of 400 bytes a token MLA's layers have 100 left in the hybrid; at 4,096 tokens 1000 bytes of states add to both
    assert (
        one(found, "The KV cache")
        == f"75.0% a token; {1 - (1000 + 409600) / (1000 + 1638400):.1%} at 4k with the states"
    )
    assert one(found, "The state") == "0 bytes a token in KDA layers"


def test_layers_at_another_ratio_than_the_papers_say_nothing_of_its_cache(tmp_path):
    other = examples.model() | {"arguments": {"preset": "tiny", "layers": "8", "ratio": "1,1"}}
    assert one(said(tmp_path, [other]), "The KV cache") == one(said(tmp_path, [other]), "The state") == claims.MISSING


def test_a_state_that_grows_is_seen(tmp_path):
    rows = [
        row | {"cache_bytes": row["cache_bytes"] + 8 * row["context"] * (row["model"] == "hybrid")}
        for row in examples.model()["rows"]
    ]
    assert one(said(tmp_path, [examples.model() | {"rows": rows}]), "The state") == "8 bytes a token in KDA layers"


def test_times_at_other_lengths_than_the_papers_say_so(tmp_path):
    found = said(tmp_path, [examples.model()])
    assert one(found, "A decoding step of MLA") == "3 at 4k, not measured at 512K and 1M (tiny, 8 layers)"
    assert one(found, "... with the batches") == one(found, "Prefill of the GDN") == claims.MISSING


def test_times_at_the_papers_lengths_are_its_own(tmp_path):
    rows = [row | {"context": 1 << (19 if row["context"] == 1024 else 20)} for row in examples.model()["rows"]]
    found = said(tmp_path, [examples.model() | {"rows": rows}])
    assert one(found, "A decoding step of MLA") == "3 at 512K, 3 at 1M (tiny, 8 layers)"


def drawn(**about) -> dict:
    """Return a benchmark behind caches that were drawn, at the paper's lengths."""
    made = examples.model() | {"schema": 2}
    rows = [
        {"model": name, "context": 1 << bits, "step_ms": step * batch, "batch": batch, "cache_bytes": 1000 << bits}
        for name, step, batch in (("hybrid", 1.0, 4), ("mla", 3.0, 1))
        for bits in (18, 19, 20)
    ]
    return made | {"rows": rows, "arguments": made["arguments"] | {"filled": "True"} | about}


def test_a_piece_behind_a_drawn_cache_is_no_prefill(tmp_path):
    made = drawn(piece="64")
    pieces = [row | {"batch": 1, "piece": 64, "piece_s": row["step_ms"] / row["batch"]} for row in made["rows"]]
    found = said(tmp_path, [made | {"rows": pieces}])
    assert one(found, "... of a piece") == "3 at 512K, 3 at 1M (tiny, 8 layers, a drawn cache, a piece of 64 tokens)"
    assert one(found, "Prefill of MLA") == claims.MISSING


def test_as_many_sequences_as_a_memory_holds_are_compared_by_the_token(tmp_path):
    found = said(tmp_path, [drawn(cache_gib="2")])
    expected = "3 at 256K, 3 at 512K, 3 at 1M (tiny, 8 layers, a drawn cache, caches of 2 GiB together)"
    assert one(found, "... with the batches") == expected
    assert one(found, "A decoding step of MLA") == claims.MISSING


@pytest.mark.parametrize("order", [1, -1])
def test_what_was_measured_where_the_paper_was_stands_before_what_is_newer(tmp_path, order):
    rows = [row | {"context": 1 << (19 if row["context"] == 1024 else 20)} for row in examples.model()["rows"]]
    long = examples.model() | {"rows": rows, "date": "2026-01-01T00:00:00+00:00"}
    found = said(tmp_path, *[[examples.model()], [long]][::order])
    assert one(found, "A decoding step of MLA") == "3 at 512K, 3 at 1M (tiny, 8 layers)"


def records(**ratios) -> list[dict]:
    run, *_ = examples.records()
    return [run, examples.case("chunk_ours", **{name: examples.outcome(x) for name, x in ratios.items()})]


@pytest.mark.parametrize(
    ("ratio", "ours"),
    [
        (0.25, "no counterexample in 1 checks, at most 0.25 of the limit: chunk_ours"),
        (1.5, "COUNTEREXAMPLE: chunk_ours"),
        ("nan", "COUNTEREXAMPLE: chunk_ours"),
    ],
)
def test_a_counterexample_is_never_a_pass(tmp_path, ratio, ours):
    assert one(said(tmp_path, records(dplr_equality=ratio)), "KDA is general") == ours


def test_what_was_not_asked_is_not_measured(tmp_path):
    assert one(said(tmp_path, records(causality=0.1)), "KDA is general") == claims.MISSING


@pytest.mark.parametrize(
    ("step", "ours"),
    [
        ({"outcome": "done", "code": 0}, "11 members"),
        ({"outcome": "done", "code": 1}, "its tests FAIL"),
        ({"outcome": "failed", "code": 4}, "its tests FAIL"),
        ({"outcome": "cut off", "code": None}, claims.MISSING),
    ],
)
def test_tests_of_the_definition_count_where_they_ended(tmp_path, step, ours):
    steps = {claims.OBJECTIVES: step | {"command": [], "seconds": 1.0, "files": []}}
    assert one(said(tmp_path, [COLLECTED | {"steps": steps}]), "Every rule").startswith(ours)


def test_the_newest_result_of_a_device_counts_and_devices_stand_apart(tmp_path):
    old = examples.yardstick() | {"date": "2026-01-01T00:00:00+00:00", "timed": []}
    other = examples.yardstick() | {"device": {"kind": "cuda", "name": "A GPU"}}
    for order in ([old, examples.yardstick(), other], [examples.yardstick(), other, old]):
        paths = [examples.document(tmp_path / f"{i}.json", x) for i, x in enumerate(order)]
        rows = [row for row in claims.rows(load.read(paths)) if row.claim.startswith("... launches")]
        assert sorted((row.device, row.source[-10:]) for row in rows) == [
            ("A CPU, 2 threads", examples.DATE[:10]),
            ("A GPU", examples.DATE[:10]),
        ]


def test_the_command_prints_every_claim_and_the_page_shows_it(tmp_path, capsys):
    path = examples.document(tmp_path / "yardstick.json", examples.yardstick())
    assert main(["claims", str(path)]) == 0
    printed = capsys.readouterr().out
    assert printed.count(claims.MISSING) >= 13 and "nearly 2 times" in printed
    assert main(["build", str(path), "--out", str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "2 at 2k; not measured at 64k; 16 heads, float32" in page and page.count(f">{claims.MISSING}</td>") >= 13
