"""The plan is counted before it runs: launches, bytes and FLOPs against the least that KDA costs."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from impls import chunk_triton, recurrent_triton
from impls.configs import ChunkTritonConfig, RecurrentTritonConfig
from impls.defaults import default_chunk
from impls.targets import named
from impls.traffic import WRITTEN, case, counted, minimum, total, training

ROOT = Path(__file__).resolve().parents[2]
SM_90 = named("sm_90")
C16 = ChunkTritonConfig(chunk_size=16, value_tile=64, segments=1)
MB = 2**20


def counts(problem, config, target=SM_90, **keywords):
    return counted(chunk_triton.plan(problem, config, target), problem, **keywords)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("H", [64, 96])
@pytest.mark.parametrize("gate_dtype", ["bfloat16", "float32"])
def test_the_default_plan_moves_at_most_four_times_the_least(target, H, gate_dtype):
    problem = case(T=8192, H=H, K=128)
    config = default_chunk(128, 128, "bfloat16", named(target))
    found = total(counts(problem, config, named(target), gate_dtype=gate_dtype))
    assert found.launches == 2
    assert found.moved <= 4 * minimum(problem, config.chunk_size, gate_dtype).bytes


def test_every_tensor_of_a_launch_counts_once():
    # H = 1, K = V = 128, T = 1024, bfloat16: a tensor like q has 256 KiB, A and X 32 KiB, the decays 32 KiB
    q, square, last, state, beta, parameters = 2**18, 2**15, 2**15, 2**16, 2**11, 4 + 512
    intra, walk = counts(case(T=1024, H=1), C16)
    assert intra.read == 3 * q + beta + parameters
    assert intra.written == 3 * q + 2 * square + last
    assert walk.read == 4 * q + 2 * square + last + state + parameters
    assert walk.written == q + state
    assert walk.requested == walk.moved + 3 * q + 2 * square + last  # two value tiles read the same rows


def test_a_plan_that_recomputes_stores_squares_alone():
    stored, recomputed = (total(counts(case(), replace(C16, recompute=x))) for x in (False, True))
    assert stored.written - recomputed.written == 3 * 128 * MB + 16 * MB
    assert stored.flops == recomputed.flops


def test_heads_that_share_a_key_request_it_again_and_read_it_once():
    problem = replace(case(T=1024, H=2), HV=8)
    intra, _ = counts(problem, C16)
    alone, _ = counts(case(T=1024, H=8), C16)
    assert intra.requested == alone.requested
    assert intra.read == alone.read - 2 * (8 - 2) * 1024 * 128 * 2


@pytest.mark.parametrize(("C", "tiles"), [(16, 1), (32, 2), (32, 1), (64, 1)])
def test_products_are_those_of_the_form_or_more(C, tiles):
    problem = case(T=1024, H=4)
    found = total(counts(problem, replace(C16, chunk_size=C, intra_tiles=tiles)))
    assert 1 <= found.flops / minimum(problem, C).flops < 2


def test_segments_cost_three_walks():
    problem = case(T=4096, H=4)
    whole, cut = (total(counts(problem, replace(C16, segments=n))) for n in (1, 8))
    assert (whole.launches, cut.launches) == (2, 4)
    assert 2 < cut.flops / whole.flops < 3


def test_the_recurrence_is_one_launch_at_the_least_bytes():
    problem = case(T=512, H=4)
    found = total(counted(recurrent_triton.plan(problem, RecurrentTritonConfig(), SM_90), problem))
    least = minimum(problem, 16)
    assert found.launches == 1
    assert least.bytes <= found.moved < 1.01 * least.bytes  # beyond: A_log and dt_bias


def test_states_that_are_kept_are_written():
    problem = replace(case(T=1024, H=1), keeps=True)
    without, with_states = (counts(replace(problem, keeps=x), C16, interval=64)[1] for x in (False, True))
    assert with_states.written - without.written == 1024 // 64 * 128 * 128 * 4


def test_packed_sequences_count_their_slots():
    problem = replace(case(T=8192, H=4), packed=True, N=6)
    intra, _ = counts(problem, C16)
    assert intra.programs == (8192 // 16 + 6) * 4


def test_every_buffer_of_every_launch_is_read_or_written():
    problem = replace(case(T=4096, H=4), keeps=True)
    for launch in chunk_triton.plan(problem, replace(C16, segments=4), SM_90).launches:
        assert set(WRITTEN[launch.name]) <= set(launch.buffers)


def test_the_command_prints_a_table():
    command = [sys.executable, "-m", "impls.traffic", "--target", "sm_90"]
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("total") == 5


def backward_rows(saves, **sizes):
    problem = replace(case(T=1024, H=1), initial=False, final=False, **sizes)
    rows = training("case", problem, SM_90, saves)
    return {launch.name: launch for _, launch, _ in rows}, rows[-1]


def test_every_tensor_of_a_backward_counts_once():
    # H = 1, K = V = 128, T = 1024, bfloat16: a tensor like q has 256 KiB, the states 8 times that
    q, square, last, strength, beta, bias = 2**18, 2**15, 2**15, 2**12, 2**11, 4 + 512
    found, _ = backward_rows(saves=False)
    assert found["within"].read == 3 * q + beta + bias
    assert found["within"].written == 3 * q + 3 * square + last + strength
    assert found["replay"].read == 3 * q + square + last + strength
    assert found["replay"].written == 9 * q
    assert found["walk_back"].read == 4 * q + 2 * square + last + strength
    assert found["walk_back"].written == 10 * q
    assert found["token_gradients"].read == 3 * q + q + 18 * q + strength + bias
    assert found["token_gradients"].written == 3 * q + beta + 64 * (4 + 512)
    assert found["parameters"].read == 64 * (4 + 512) and found["parameters"].written == bias


def test_saving_moves_less_than_recomputing_and_says_what_it_keeps():
    (saving, (name, both, _)), (recomputing, (other, alone, _)) = (backward_rows(saves) for saves in (True, False))
    forward = total(counts(replace(case(T=1024, H=1), initial=False, final=False), C16))
    assert both.launches == 5 and alone.launches == 5
    assert both.moved < alone.moved + forward.moved and both.flops < alone.flops + forward.flops
    assert saving["replay"].flops > recomputing["replay"].flops
    assert (name, other) == ("case: 2 MB, 3 saved", "case: 6 MB")


def test_value_heads_that_share_a_key_ask_for_it_again():
    found, _ = backward_rows(saves=False, HV=4)
    alone, _ = backward_rows(saves=False)
    assert found["within"].requested == 4 * alone["within"].requested
    assert found["token_gradients"].flops == 4 * alone["token_gradients"].flops


@pytest.mark.parametrize("saves", [False, True])
def test_products_of_a_backward_are_those_of_the_form_or_more(saves):
    _, (_, found, least) = backward_rows(saves)
    assert 1 <= found.flops / least.flops < 2
