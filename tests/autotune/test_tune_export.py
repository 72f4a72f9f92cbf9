"""`python -m autotune export` writes what other tools read, of real files, and loses or invents nothing."""

import hashlib
import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from autotune.__main__ import main
from autotune.export import KERNELS, _invalidity
from autotune.outcomes import PASS, USAGE
from autotune.replay import Recorded
from autotune.search import Outcome
from impls import ChunkTritonConfig, RecurrentTritonConfig, chunk_triton, recurrent_triton, tuned
from impls.plan import Problem
from impls.targets import named

TABLE = Path(__file__).with_name("trials-chunk-torch-4096.json")
PACKAGED = tuned.PACKAGED / tuned.GENERIC / "chunk_torch.json"
CONFIG = ChunkTritonConfig(chunk_size=32, value_tile=128, segments=2, intra_tiles=2, walk_warps=8, walk_registers=168)
SHAPE = tuned.Shape(8192, 1, 64, 128, 64, "bfloat16", False)

NUMBER, TEXT, WHOLE = {"type": "number"}, {"type": "string"}, {"type": "integer"}


def record(**fields) -> dict:
    return {"type": "object", "required": list(fields), "properties": fields}


FORMATS = {
    "t4": record(
        schema_version={"const": "1.0.0"},
        results={
            "type": "array",
            "items": record(
                timestamp=TEXT,
                configuration={"type": "object", "minProperties": 1},
                times={"type": "object", "properties": {"benchmark": NUMBER, "runtimes": {"type": "array"}}},
                invalidity={"enum": ["timeout", "compile", "runtime", "correctness", "constraints", "correct"]},
                correctness=NUMBER,
                measurements={"type": "array", "items": record(name=TEXT, value=NUMBER, unit=TEXT)},
                objectives={"type": "array", "items": TEXT},
            ),
        },
    ),
    "vllm": {
        "type": "object",
        "properties": {"triton_version": TEXT},
        "patternProperties": {
            "^[1-9][0-9]*$": {"type": "object", "additionalProperties": {"type": ["integer", "boolean"]}}
        },
        "additionalProperties": False,
    },
    "fla": record(
        kernel_name=TEXT,
        triton_version=TEXT,
        autotune_entries={
            "propertyNames": {"pattern": "^[0-9a-f]{32}$"},
            "additionalProperties": record(autotune_key={"type": "array"}, config={"$ref": "#/$defs/config"}),
        },
        default_config={"oneOf": [{"type": "null"}, {"$ref": "#/$defs/config"}]},
    )
    | {"$defs": {"config": record(kwargs={"type": "object"}, num_warps=WHOLE, num_stages=WHOLE, num_ctas=WHOLE)}},
}
"""What readers of a format rely on."""


def exported(form: str, file: Path, out: Path) -> dict[str, dict]:
    """Export; return what was written by name, once it follows the format."""
    assert main(["export", str(file), "--format", form, "--out", str(out)]) == PASS
    written = {path.name: json.loads(path.read_text()) for path in ([out] if form == "t4" else out.iterdir())}
    for data in written.values():
        Draft202012Validator(FORMATS[form]).validate(data)
    return written


def triton_file(folder: Path, name: str = "chunk_triton", config=CONFIG, default: dict | None = None) -> Path:
    """Write a tuned file of a Triton implementation: the packaged one's entry with another shape and configuration."""
    data = json.loads(PACKAGED.read_text())
    data |= {"implementation": name, "default": default}
    data["device"] = {"kind": "cuda", "name": "NVIDIA H200", "capability": "9.0", "units": 132}
    entry = data["entries"][0] | {"config": asdict(config)}
    data["entries"] = [entry | {"shape": shape._asdict()} for shape in (SHAPE, SHAPE._replace(T=1, N=8))]
    tuned.check(data)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(data))
    return path


def test_every_recorded_trial_is_in_t4_with_its_time_and_whether_it_was_correct(tmp_path):
    (data,) = exported("t4", TABLE, tmp_path / "t4.json").values()
    table = Recorded(TABLE)
    found = {tuned.config_of("chunk_torch", x["configuration"]): x for x in data["results"]}
    assert len(found) == len(data["results"]) == 102 and found.keys() == table.outcomes.keys()
    for config, outcome in table.outcomes.items():
        values = {x["name"]: x["value"] for x in found[config]["measurements"]}
        assert (found[config]["invalidity"], found[config]["correctness"]) == ("correct", 1)
        assert values["time"] == outcome.ms.median and values["time_over_default"] == outcome.ratio.median
        assert found[config]["times"]["benchmark"] == 1e3 * outcome.seconds


OUTCOMES = {
    "wrong": (("wrong", "o is 1.0 away from the default's"), "correctness"),
    "pruned": (("pruned", "spills"), "constraints"),
    "timeout": (("failed", "TimeoutError: 60 s"), "timeout"),
    "compile": (("failed", "CompilationError: at 3:5"), "compile"),
    "runtime": (("failed", "RuntimeError: CUDA error: Timeout or CompilationError"), "runtime"),
    "nothing said": (("failed", None), "runtime"),
}


@pytest.mark.parametrize(("outcome", "word"), OUTCOMES.values(), ids=OUTCOMES)
def test_what_was_not_correct_says_why_and_has_no_time(tmp_path, outcome, word):
    status, message = outcome
    assert _invalidity(Outcome(status, 1.0, message=message)) == word
    data = json.loads(TABLE.read_text())
    data["points"][1]["outcome"] |= {"status": status, "message": message, "ratio": None, "ms": None}
    (tmp_path / "table.json").write_text(json.dumps(data))
    (written,) = exported("t4", tmp_path / "table.json", tmp_path / "t4.json").values()
    result = written["results"][1]
    assert (result["invalidity"], result["correctness"], result["measurements"]) == (word, 0, [])


def test_a_packaged_file_is_one_of_vllms_by_tokens(tmp_path):
    written = exported("vllm", PACKAGED, tmp_path / "vllm")
    entries = tuned.read(PACKAGED)["entries"]
    (name, data), *more = written.items()
    assert name == "H=16,K=128,V=128,device_name=generic-cpu,dtype=float32.json" and not more
    assert data.pop("triton_version") == "3.7.1"
    assert data == {str(entry["shape"]["T"]): entry["config"] for entry in entries}


def test_shapes_that_differ_in_more_than_tokens_have_files_of_their_own(tmp_path):
    written = exported("vllm", triton_file(tmp_path), tmp_path / "vllm")
    usual = "H=64,K=128,V=64,device_name=NVIDIA_H200,dtype=bfloat16.json"
    assert written == {
        usual: {"triton_version": "3.7.1", "8192": asdict(CONFIG)},
        usual.replace("V=64", "V=64,N=8"): {"triton_version": "3.7.1", "1": asdict(CONFIG)},
    }


def test_a_devices_name_is_no_path(tmp_path):
    file = triton_file(tmp_path)
    file.write_text(file.read_text().replace("NVIDIA H200", "../../H200 / MIG"))
    names = exported("vllm", file, tmp_path / "vllm")
    assert all("device_name=.._.._H200___MIG," in name for name in names)


def test_fla_gets_a_file_per_kernel_with_the_parameters_that_are_launched(tmp_path):
    written = exported("fla", triton_file(tmp_path, default=asdict(CONFIG)), tmp_path / "fla")
    problem = Problem(1, 8192, 1, 64, 64, 128, 64, "bfloat16")
    plan = chunk_triton.plan(problem, CONFIG, named("sm_90"))
    launches = {launch.name: launch for launch in plan.launches}
    assert written.keys() == {"intra.json", "walk.json"}
    for kernel, launch in ((kernel, launches[kernel]) for kernel in ("intra", "walk")):
        data = written[f"{kernel}.json"]
        key = [8192, 1, 64, 128, 64, False, "torch.bfloat16"]
        entry = data["autotune_entries"][hashlib.md5(json.dumps(key, separators=(",", ":")).encode()).hexdigest()]
        config = entry["config"]
        assert data["kernel_name"] == kernel and entry["autotune_key"] == key and len(data["autotune_entries"]) == 2
        assert config["kwargs"] == {name: launch.constants[name] for name in config["kwargs"]}
        assert (config["num_warps"], config["num_stages"]) == (
            launch.options["num_warps"],
            launch.options["num_stages"],
        )
        assert config["maxnreg"] == launch.options.get("maxnreg")
    assert written["walk.json"]["default_config"]["kwargs"]["BV"] == 128, "the default row serves any V"


def test_fla_gets_the_recurrence_too(tmp_path):
    config = RecurrentTritonConfig(value_tile=16, warps=2)
    (data,) = exported("fla", triton_file(tmp_path, "recurrent_triton", config), tmp_path / "fla").values()
    (first, _) = data["autotune_entries"].values()
    assert (first["config"]["kwargs"], first["config"]["num_warps"]) == ({"BV": 16}, 2)
    assert data["kernel_name"] == recurrent_triton.recurrent.fn.__name__ and data["default_config"] is None


@pytest.mark.parametrize("kernel", [chunk_triton.intra, chunk_triton.walk, recurrent_triton.recurrent])
def test_the_parameters_are_the_kernels_own(kernel):
    names = {name: x for kernels in KERNELS.values() for name, x in kernels.items()}
    assert names[kernel.fn.__name__].keys() <= set(kernel.arg_names)


REFUSED = [
    (
        ["fla", PACKAGED],
        "FILE .*chunk_torch.json: --format fla is for the Triton kernels of .*; chunk_torch launches none",
    ),
    (["fla", TABLE], "FILE .* is no file of tuned configurations"),
    (["vllm", TABLE], "FILE .* is no file of tuned configurations"),
    (["vllm", Path("missing.json")], "FILE missing.json is no file of tuned configurations: .*No such file"),
    (["t4", PACKAGED], "FILE .* no table of trials"),
    (["t4", Path("missing.json")], "FILE missing.json: no table of trials"),
]


@pytest.mark.parametrize(("asked", "message"), REFUSED, ids=[f"{x[0]} {x[1].name}" for x, _ in REFUSED])
def test_what_cannot_be_exported_is_refused_and_nothing_is_written(tmp_path, capsys, asked, message):
    form, file = asked
    assert main(["export", str(file), "--format", form, "--out", str(tmp_path / "out")]) == USAGE
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and not list(tmp_path.iterdir())
    assert re.search(message, error)


def test_an_unknown_format_is_named_with_the_known_ones(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["export", str(PACKAGED), "--format", "xml", "--out", "x"])
    assert ended.value.code == USAGE
    assert "--format: invalid choice: 'xml' (choose from" in capsys.readouterr().err


def test_the_table_itself_is_not_replaced(tmp_path, capsys):
    file = tmp_path / "table.json"
    file.write_text(TABLE.read_text())
    assert main(["export", str(file), "--format", "t4", "--out", str(tmp_path / "." / "table.json")]) == USAGE
    assert "--out" in capsys.readouterr().err and file.read_text() == TABLE.read_text()
