"""List what a collection runs, in its order: verification, tuning, benchmarks."""

from dataclasses import dataclass

from reports.claims import FORMS, OBJECTIVES


@dataclass(frozen=True)
class Step:
    """One command: arguments with {folder}, {device} and {minutes}, and what it writes."""

    name: str
    command: tuple[str, ...]
    """Behind `python -m`."""
    writes: str
    """A pattern of the files in the folder."""
    needs: float
    """Seconds on two quiet cores: of what is told its minutes the least that is worth beginning."""
    weight: float = 0.0
    """Of the time that is to spare, for what is told its minutes."""
    done: tuple[int, ...] = (0,)
    """Exit codes with which it has said what it had to say: a failed property is a result, too."""
    after: float = 0.0
    """Seconds that it takes behind the minutes it is told, on two quiet cores."""
    leaves: float = 0.0
    """Seconds of these that it leaves of its minutes by itself."""
    resumes: bool = False
    """Whether it goes on with its own files; those of the others are removed before they are run again."""

    @property
    def clocked(self) -> bool:
        """Tell whether it fills the minutes it is told."""
        return "{minutes}" in self.command


_TUNED = ("--out", "{folder}/tuned", "--minutes", "{minutes}", "--record")
_TUNE = ("autotune", "tune", "--device", "{device}", "--op")
_BENCH = ("autotune", "bench", "--device", "{device}", "--minutes", "{minutes}", "--out", "{folder}/bench.json")
_MODEL = ("kimi_linear", "bench", "--device", "{device}", "--preset", "tiny", "--layers", "8", "--json")
_BASELINES = ("{folder}/model.json", "--baseline", "hybrid,mla,gdn-hybrid", "--context")
_SELF_TEST = ("verify", "--self-test", "--json", "{folder}/self-test.jsonl")
_YARDSTICK = ("autotune", "yardstick", "--device", "{device}", "--minutes", "{minutes}")
_TIMED = ("-m", "", "--benchmark-enable", "--results", "{folder}")
_JUDGED = (0, 1, 5)
RACE, LEFT = 90.0, 60.0
"""Seconds of the tuner's race and of its judge, and what `autotune tune --minutes` leaves of its minutes for them."""
COMPILING = 40.0
"""Seconds that the yardstick compiles before its clock runs, and of the call that overruns it."""


def _verified(*arguments: str, needs: float = 60) -> Step:
    command = ("verify", *arguments, "--json", "{folder}/verify.jsonl", "--resume")
    return Step("verify", command, "verify.jsonl", needs, done=_JUDGED, resumes=True)


def _tested(name: str, file: str) -> Step:
    command = ("pytest", "-q", "-m", "", f"tests/kda_spec/{file}")
    return Step(name, command, f"{name.replace(' ', '-')}.log", 10, done=(0, 1))


def _tuned(op: str) -> Step:
    command, table = (*_TUNE, op, *_TUNED, f"{{folder}}/trials-{op}.json"), f"trials-{op}.json"
    return Step(f"tune {op}", command, table, 180, 3, (0, 1), RACE, LEFT, resumes=True)


def _timed(name: str, file: str, which: str, needs: float) -> Step:
    command = ("pytest", f"tests/benchmarks/{file}", *_TIMED, "-k", which)
    return Step(name, command, "cpu-*.json", needs, done=(0, 1), resumes=True)


def _held(*arguments: str) -> Step:
    command = (*_YARDSTICK, *arguments, "--out", "{folder}/yardstick.json")
    return Step("yardstick", command, "yardstick.json", 100, 2, after=COMPILING, resumes=True)


CPU = (
    _verified(),
    Step("model verify", ("verify", "kimi_linear", "--json", "{folder}/model.jsonl"), "model.jsonl", 25, done=_JUDGED),
    Step("self-test", _SELF_TEST, "self-test.jsonl", 80, done=(0, 1, 4)),
    _tested(FORMS, "test_spec_forms.py"),
    _tested(OBJECTIVES, "test_spec_family.py"),
    _tuned("chunk_torch"),
    _tuned("recurrent_torch"),
    Step("bench", (*_BENCH, "--cases", "small-*,t1024-*"), "bench.json", 90, 2, (0, 1), resumes=True),
    _held(),
    Step("model", (*_MODEL, *_BASELINES, "1024,4096"), "model.json", 60),
    _timed("prefill", "test_bench_cpu.py", "test_case and not decode", 90),
    _timed("decode", "test_bench_cpu.py", "test_case and decode", 30),
    _timed("growth", "test_bench_cpu.py", "not test_case", 60),
)  # fmt: skip
CUDA = (
    _verified("--device", "{device}", needs=120),
    _tuned("chunk_triton"),
    _tuned("recurrent_triton"),
    Step("bench", _BENCH, "bench.json", 120, 4, (0, 1), resumes=True),
    _held("--heads", "64"),
    Step("model", (*_MODEL, *_BASELINES, "4096,65536"), "model.json", 60),
)  # fmt: skip
