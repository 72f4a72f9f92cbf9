"""JUnit XML: a suite for every target, a test case for every property, for the pages of CI systems."""

import re
from pathlib import Path
from xml.etree import ElementTree as xml

from verify.properties import PROPERTIES
from verify.recipes import from_json, words
from verify.records import INFINITE
from verify.session import Verdict

ILLEGAL = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What XML 1.0 cannot hold, not even escaped: a target's exceptions may."""


def write(path: Path, verdicts: list[Verdict], commands: dict[str, list[str]], strict: bool = False) -> None:
    """Write a report. `commands`: by target what shows its failures again, in their order."""
    root = xml.Element("testsuites", name="python -m verify")
    for verdict in verdicts:
        root.append(_suite(verdict, commands.get(verdict.target, []), strict))
    for name in ("tests", "failures", "errors", "skipped"):
        root.set(name, str(sum(int(suite.get(name)) for suite in root)))
    xml.indent(root)
    xml.ElementTree(root).write(path, encoding="utf-8", xml_declaration=True)


def _suite(verdict: Verdict, commands: list[str], strict: bool) -> xml.Element:
    suite = xml.Element("testsuite", name=_legal(verdict.target))
    told = {x["property"]: (x, command) for x, command in zip(verdict.failures, commands, strict=True)}
    for prop in PROPERTIES:
        for name in (prop.name, prop.name + INFINITE):
            if cell := verdict.cells.get(name):
                case = _case(suite, verdict, name)
                case.set("assertions", str(cell.cases))
                if cell.ratio > 1:
                    _failed(case, cell.worst, *told.get(name, (None, "")))
    for name, reason in (verdict.done or {}).get("not_asked", {}).items():
        xml.SubElement(_case(suite, verdict, name), "skipped", message=_legal(reason))
    for probe in verdict.probes:
        _probed(suite, verdict, probe)
    if strict:
        for term in verdict.untested():
            xml.SubElement(_case(suite, verdict, f"term: {term}"), "failure", message="no case exercised it")
    if verdict.broken:
        error = xml.SubElement(_case(suite, verdict, "run"), "error", message=_legal(verdict.broken["reason"]))
        error.text = _legal(verdict.broken.get("trace", ""))
    kinds = {"failures": "failure", "errors": "error", "skipped": "skipped"}
    counts = {name: len(suite.findall(f"testcase/{kind}")) for name, kind in kinds.items()}
    for name, count in {"tests": len(suite), **counts}.items():
        suite.set(name, str(count))
    suite.set("time", str((verdict.done or {}).get("seconds", {}).get("all", 0.0)))
    return suite


def _case(suite: xml.Element, verdict: Verdict, name: str) -> xml.Element:
    return xml.SubElement(suite, "testcase", classname=_legal(verdict.target), name=_legal(name))


def _failed(case: xml.Element, worst: dict, failure: dict | None, command: str) -> None:
    text = f"{worst['what']} {worst['where']}: observed {worst['observed']}, allowed {worst['allowed']}"
    element = xml.SubElement(case, "failure", message=_legal(text), type="property")
    if failure:
        element.text = _legal(f"{words(from_json(failure['recipe']))}\n{command}\n")


def _probed(suite: xml.Element, verdict: Verdict, probe: dict) -> None:
    if probe["outcome"] == "supported":
        return
    case = _case(suite, verdict, f"takes {probe['axis']}")
    kind = "skipped" if probe["outcome"] == "refused" else "failure"
    xml.SubElement(case, kind, message=_legal(f"{probe['outcome']}: {probe['reason']}"))


def _legal(text: str) -> str:
    return ILLEGAL.sub("?", text)
