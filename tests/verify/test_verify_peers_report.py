"""The report on other people's kernels: what was found, in words that any Markdown shows as they are."""

import pytest

from verify import peers_report, records, session
from verify.__main__ import main
from verify.peers import Peer


@pytest.fixture
def peers(monkeypatch):
    """Stand in for other people's packages: a right kernel, a wrong one, one that is not here."""
    names = ("float64_copy", "undecayed")
    there = {name: Peer("torch", f"broken_kernels:{name}", f"a kernel, {name}") for name in names}
    away = Peer("no-such-package", "no_such_package:f", "not here")
    for module in ("verify.peers_report", "verify.resolve", "verify.choice", "verify.judging", "verify.replay"):
        if hasattr(__import__(module, fromlist=["PEERS"]), "PEERS"):
            monkeypatch.setattr(f"{module}.PEERS", there | {"away": away})
    return there


def test_the_report_says_what_was_found_and_what_is_not_here(peers, in_process, tmp_path, capsys):
    files = ("-o", str(tmp_path / "PEERS.md"), "--out", str(tmp_path), "--json", str(tmp_path / "peers.jsonl"))
    assert main(["peers", "--profile", "smoke", *files]) == session.PASS
    text = (tmp_path / "PEERS.md").read_text()
    assert "| float64_copy | torch" in text and "no counterexample" in text
    assert "counterexamples to" in text and "- `reference_forward`: `" in text
    assert "| away | no-such-package | - | not installed here | - |" in text
    assert "UNSUPPORTED: `use_gate_in_kernel`" in text and "python -m verify undecayed --replay" in text
    before = len(records.read(tmp_path / "peers.jsonl"))
    assert main(["peers", "--profile", "smoke", *files]) == session.PASS  # nothing is judged again
    assert len(records.read(tmp_path / "peers.jsonl")) == before


@pytest.mark.parametrize(
    "arguments, named", [(["flaa"], "did you mean fla"), (["--profile", "quik"], "did you mean quick")]
)
def test_what_is_no_peer_or_profile_is_exit_code_2(arguments, named, capsys):
    assert main(["peers", *arguments]) == session.USAGE
    assert named in capsys.readouterr().err


def test_what_a_target_says_cannot_break_the_page():
    shown = peers_report._code("a `b`\n| <script>")
    assert shown == "`a  b  | <script>`"
