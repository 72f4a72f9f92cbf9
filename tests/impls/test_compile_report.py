"""Kernels are compiled with no GPU; what the compiler made of them is counted, stored and judged."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from impls.assembly import Instruction, counts, gcn, products, sass
from impls.compile_report import KERNELS, Row, main, reference
from impls.compiler_triton import Job, signature
from impls.configs import ChunkTritonConfig
from impls.plan import ITEMSIZE
from impls.targets import named

ROOT = Path(__file__).resolve().parents[2]
SM_90 = named("sm_90")
SPILLING = {"recurrent_triton": {"value_tile": 32, "warps": 1, "stages": 1, "registers": 64}}


def child(*arguments):
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "impls.compile_report", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


def report(path, *arguments):
    run = child(*arguments, "--out", path)
    assert path.is_file(), run.stderr
    return run, json.loads(path.read_text())


def expect_clean(run, found, dims):
    assert run.returncode == 0, run.stdout
    rows = found["rows"]
    assert {(row["K"], row["kernel"]) for row in rows} >= {(K, kernel) for K in dims for kernel in KERNELS}
    for row in rows:
        assert row["error"] is None and row["fits"] and not row["failed"], row
        assert not row["spilled"] or row["K"] == 256, row


def test_every_kernel_of_the_default_fits_sm_90_and_spills_nothing(tmp_path):
    run, found = report(tmp_path / "a.json", "--targets", "sm_90", "--head-dims", "128")
    expect_clean(run, found, (128,))
    assert found["schema"] == 1 and found["dtype"] == "bfloat16" and found["ptxas"] and found["triton"]
    resources = {row["kernel"]: row["resources"] for row in found["rows"]}
    assert all(0 < x["registers"] <= 255 for x in resources.values())
    for kernel in ("intra", "walk", "summary", "combine"):
        assert resources[kernel]["code"]["tensor"] > 0
        assert resources[kernel]["shared_memory"] > 0
    # alpha and softplus: at least an exponential and a logarithm of 16 x 128 elements over 64 lanes
    assert resources["intra"]["code"]["special"] >= 2 * 16 * 128 / (32 * resources["intra"]["warps"])
    assert 0 < resources["walk"]["loop"]["instructions"] < resources["walk"]["code"]["instructions"]
    assert resources["recurrent"]["code"]["tensor"] == 0


def test_a_kernel_compiles_for_amd(tmp_path):
    run, found = report(
        tmp_path / "a.json", "--targets", "gfx942", "--kernel", "combine", "--kernel", "recurrent", "--head-dims", "64"
    )
    assert run.returncode == 0, run.stdout
    combine, recurrent = (row["resources"] for row in found["rows"])
    assert combine["code"]["tensor"] > 0 and combine["code"]["barrier"] > 0
    assert recurrent["code"]["special"] > 0 and 0 < recurrent["registers"] <= 512


def test_a_spill_fails_and_is_shown(tmp_path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(SPILLING))
    arguments = ("--targets", "sm_90", "--kernel", "recurrent", "--head-dims", "64", "--config", config)
    run, found = report(tmp_path / "a.json", *arguments)
    assert run.returncode == 1
    assert "spills" in run.stdout
    [row] = found["rows"]
    assert row["spilled"] and row["resources"]["stack"] > 0 and row["resources"]["code"]["local"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_every_default_fits_every_target_and_spills_nothing_below_256(tmp_path, target):
    expect_clean(*report(tmp_path / "a.json", "--targets", target), (64, 128, 256))


def row(K=128, shared=1024, stack=0, local=0, error=None):
    resources = None if error else {"shared_memory": shared, "stack": stack, "code": {"local": local}}
    return Row("sm_90", "walk", K, {}, resources, 227 * 1024, error)


@pytest.mark.parametrize(
    ("made", "failed", "trouble"),
    [
        (row(), False, ""),
        (row(stack=8), True, "spills"),
        (row(local=1), True, "spills"),
        (row(K=64, stack=8), True, "spills"),
        (row(K=256, stack=8), False, "spills"),
        (row(shared=227 * 1024), False, ""),
        (row(shared=227 * 1024 + 1), True, "needs 232449 bytes of 232448"),
        (row(K=256, shared=2**20), True, "needs 1048576 bytes of 232448"),
        (row(K=256, error="CompilationError: no"), True, "CompilationError: no"),
    ],
)
def test_a_row_fails_by_a_spill_below_256_by_memory_and_by_an_error(made, failed, trouble):
    assert (made.failed, made.trouble) == (failed, trouble)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--targets", "sm_1"], "--targets: 'sm_1' is not one of sm_80, "),
        (["--targets", "interpret"], "--targets: 'interpret' is not one of"),
        (["--head-dims", "64,257"], "--head-dims: '257' is not one of"),
        (["--config", "missing.json"], "--config missing.json: FileNotFoundError"),
        (["--out", "missing/a.json"], "--out missing/a.json: there is no folder missing"),
        ([], "TRITON_INTERPRET was set when Triton was imported; unset it"),
    ],
)
def test_wrong_usage_exits_with_2_and_says_why(capsys, arguments, message):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "AttributeError"),
        ('{"chunk_torch": {}}', "KeyError: 'chunk_torch'"),
        ('{"chunk_triton": {"warps": 4}}', "unexpected keyword argument 'warps'"),
        ('{"chunk_triton": {"chunk_size": 24}}', "chunk_triton: chunk_size must be one of"),
    ],
)
def test_a_wrong_configuration_exits_with_2_and_says_why(capsys, tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    assert main(["--config", str(tmp_path / "config.json")]) == 2
    assert message in capsys.readouterr().err


def test_argparse_exits_with_2():
    with pytest.raises(SystemExit) as stop:
        main(["--kernel", "delta"])
    assert stop.value.code == 2


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("config", [ChunkTritonConfig(segments=1), ChunkTritonConfig(segments=4), None])
def test_pointers_have_the_dtypes_of_the_workspace(dtype, config):
    problem = replace(reference(128, dtype), packed=True, keeps=True)
    plan = Job(problem, config, SM_90, "").plan
    bits = {"*fp32": 4, "*bf16": 2, "*fp16": 2, "*i64": 8}
    for launch in plan.launches:
        types = signature(launch, problem)
        assert {name for name, kind in types.items() if kind.startswith("*")} == set(launch.buffers)
        assert types.get("cu_seqlens", "*i64") == "*i64"
        for name in set(launch.buffers) & set(plan.workspace):
            assert bits[types[name]] == ITEMSIZE[plan.workspace[name][0]]


SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;                        /* 0x00000a00ff017b82 */
                                                                                 /* 0x000fe20000000800 */
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;              /* 0x0000000402047981 */
                                                                                 /* 0x000ea2000c1e1d00 */
.L_x_1:
        /*0020*/                   LDSM.16.M88.4 R8, [R1] ;                      /* 0x000000000108783b */
                                                                                 /* 0x000e240000000200 */
        /*0030*/                   HMMA.16816.F32.BF16 R4, R8, R4, RZ ;          /* 0x000000040804723c */
                                                                                 /* 0x001fde00000418ff */
        /*0040*/               @P1 BRA `(.L_x_2) ;                               /* 0x0000000000941947 */
                                                                                 /* 0x000fea0003800000 */
        /*0050*/                   HGMMA.64x16x16.F32.BF16 R4, R8, gdesc[UR4] ;  /* 0x002000000404 79f0 */
        /*0060*/                   MUFU.EX2 R5, R5 ;                             /* 0x0000000500057308 */
                                                                                 /* 0x000e240000000800 */
.L_x_2:
        /*0070*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;                 /* 0x0000000000007b1d */
                                                                                 /* 0x000fec0000010000 */
        /*0080*/                   BRA.U UP0, `(.L_x_1) ;                        /* 0xfffffff900e40547 */
                                                                                 /* 0x000fea000b83ffff */
        /*0090*/                   STL [R1], R5 ;                                /* 0x0000000501007387 */
                                                                                 /* 0x000fe20000100800 */
        /*00a0*/              @!P0 EXIT ;                                        /* 0x000000000000894d */
                                                                                 /* 0x000fea0003800000 */
.L_x_3:
        /*00b0*/                   BRA `(.L_x_3) ;                               /* 0xfffffffc00fc7947 */
                                                                                 /* 0x000fc0000383ffff */
        /*0044*/ \t.byte\t0x04, 0x00
""".replace("404 79f0", "40479f0")

GCN = """
\t.text
walk:
\ts_load_dword s0, s[4:5], 0x0
.LBB0_1:
\ts_cbranch_scc1 .LBB0_4
\tds_read_b128 v[0:3], v4
\tds_read2_b64 v[0:3], v4 offset1:1
\tv_mfma_f32_16x16x16_bf16 v[0:3], v[4:5], v[6:7], v[0:3]
\tv_exp_f32_e32 v1, v1 ; exponential
\ts_barrier
\ts_branch .LBB0_1
.LBB0_4:
\tscratch_load_dword v1, off, s0
\tglobal_store_dword v1, v2, s[0:1]
\ts_endpgm
\t.section\t.rodata,"a",@progbits
\tds_read_b128 v[0:3], v4
"""


def kinds(found):
    return {name: getattr(found, name) for name in ("instructions", "tensor", "special", "barrier", "local", "shared")}


def test_sass_is_counted_and_its_loop_found():
    code = sass(SASS)
    whole, loop = counts(code.instructions, True), counts(code.loop, True)
    assert kinds(whole) == dict(instructions=12, tensor=2, special=1, barrier=1, local=1, shared=1)
    assert kinds(loop) == dict(instructions=7, tensor=2, special=1, barrier=1, local=0, shared=1)
    assert (whole.global_, loop.global_, loop.wavefronts) == (1, 0, 4)


def test_gcn_is_counted_and_its_loop_found():
    code = gcn(GCN)
    whole, loop = counts(code.instructions, False), counts(code.loop, False)
    assert kinds(whole) == dict(instructions=11, tensor=1, special=1, barrier=1, local=1, shared=2)
    assert kinds(loop) == dict(instructions=7, tensor=1, special=1, barrier=1, local=0, shared=2)
    assert (whole.global_, loop.wavefronts) == (1, 16)


@pytest.mark.parametrize(
    ("opcode", "expected"),
    [
        ("HMMA.16816.F32.BF16", 16 * 8 * 16),
        ("HMMA.1688.F32.TF32", 2 * 16 * 8 * 8),
        ("HGMMA.64x32x16.F32.BF16", 16 * 32 * 16),
        ("v_mfma_f32_32x32x8_bf16", 32 * 32 * 8),
        ("v_mfma_f32_16x16x4_f32", 8 * 16 * 16 * 4),
        ("UTCHMMA", 0),
    ],
)
def test_products_of_matrix_instructions(opcode, expected):
    assert products(Instruction(opcode, "")) == expected
