"""No two programs of one launch meet: what one stores no other stores or reads. The interpreter runs them in order."""

from collections import defaultdict

import numpy as np
import pytest
import torch
from triton.runtime import interpreter

from impls import kda
from impls.configs import ChunkTritonConfig, RecurrentTritonConfig
from impls.plan import Launch


class Trace:
    """Record the addresses that each program of one launch loads and stores: program -> addresses."""

    def __init__(self, name: str):
        self.name, self.loaded, self.stored = name, defaultdict(set), defaultdict(set)

    def note(self, addresses: dict[int, set], pointers, mask) -> None:
        program = interpreter.interpreter_builder.grid_idx[0]
        data, mask = np.broadcast_arrays(pointers.data, mask.data)
        addresses[program].update(data[mask.astype(bool)].tolist())


@pytest.fixture
def traces(monkeypatch):
    """Return the traces of the launches of this test, in order."""
    found, builder = [], interpreter.InterpreterBuilder
    load, store, run = builder.create_masked_load, builder.create_masked_store, Launch.run

    def traced_load(self, pointers, mask, *rest):
        found[-1].note(found[-1].loaded, pointers, mask)
        return load(self, pointers, mask, *rest)

    def traced_store(self, pointers, value, mask, *rest):
        found[-1].note(found[-1].stored, pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def traced_run(self, buffers, scalars):
        found.append(Trace(self.name))
        run(self, buffers, scalars)

    monkeypatch.setattr(builder, "create_masked_load", traced_load)
    monkeypatch.setattr(builder, "create_masked_store", traced_store)
    monkeypatch.setattr(Launch, "run", traced_run)
    return found


CUT = ["intra", "summary", "combine", "walk"]
CASES = [
    ("chunk_triton", ChunkTritonConfig(value_tile=16, segments=1), ["intra", "walk"]),
    ("chunk_triton", ChunkTritonConfig(value_tile=16, segments=3), CUT),
    ("chunk_triton", ChunkTritonConfig(chunk_size=32, intra_tiles=2, segments=2), CUT),
    ("chunk_triton", ChunkTritonConfig(segments=3, recompute=True), CUT),
    ("recurrent_triton", RecurrentTritonConfig(value_tile=16), ["recurrent"]),
]


@pytest.mark.parametrize(
    "name, config, launches", CASES, ids=["once", "segments", "two tiles", "recompute", "recurrent"]
)
@pytest.mark.parametrize(
    "bounds, v_first", [(None, False), ((0, 0, 65, 65, 66), True)], ids=["padded", "packed, V before K"]
)
def test_what_a_program_stores_no_other_of_its_launch_stores_or_reads(
    draw, draw_state, traces, name, config, launches, bounds, v_first
):
    N, K, V = 1 if bounds is None else len(bounds) - 1, 17, 20
    S0 = draw_state(N, 2, *((V, K) if v_first else (K, V)))
    asked = {"output_final_state": True, "return_intermediate_states": True, "state_interval": 32}
    packing = None if bounds is None else torch.tensor(bounds)
    kda(
        *draw(1, 66, 1, 2, K, V), implementation=name, config=config, initial_state=S0, cu_seqlens=packing,
        state_v_first=v_first, **asked,
    )  # fmt: skip
    assert [trace.name for trace in traces] == launches
    assert_apart(traces)


@pytest.mark.parametrize("bounds, v_first", [(None, False), ((0, 0, 65, 65, 66), True)], ids=["padded", "packed"])
def test_nor_on_the_way_back(draw, draw_state, traces, bounds, v_first):
    N, K, V = 1 if bounds is None else len(bounds) - 1, 17, 40
    S0, packing = draw_state(N, 2, *((V, K) if v_first else (K, V))), None if bounds is None else torch.tensor(bounds)
    leaves = [x.requires_grad_() for x in (*draw(1, 66, 1, 2, K, V), S0, torch.zeros(2), torch.zeros(2 * K))]
    o, S = kda(
        *leaves[:5], implementation="chunk_triton", initial_state=S0, A_log=leaves[6], dt_bias=leaves[7],
        cu_seqlens=packing, state_v_first=v_first, output_final_state=True, use_gate_in_kernel=True,
    )  # fmt: skip
    traces.clear()
    (o.sum() + S.sum()).backward()
    assert [trace.name for trace in traces] == ["within", "replay", "walk_back", "token_gradients", "parameters"]
    assert_apart(traces)


def assert_apart(traces):
    for trace in traces:
        owner = {address: program for program, stored in trace.stored.items() for address in stored}
        assert len(trace.stored) > 1 and len(owner) == sum(map(len, trace.stored.values()))
        for program, loaded in trace.loaded.items():
            assert all(owner[address] == program for address in loaded & owner.keys())
