"""The reader of HLO counts what a step sends: groups, loops, dead code, scattered sums."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import lmjax
from lmjax.hlo.collectives import Collective, collectives
from lmjax.hlo.replica_groups import devices_of, spanned

MESH = {"data": 2, "fsdp": 2, "tensor": 2}

GROUPS = {
    "{{0,1},{2,3},{4,5},{6,7}}": (0, 1),
    "{}": tuple(range(8)),
    "[4,2]<=[8]": (0, 1),
    "[2,4]<=[4,2]T(1,0)": (0, 2, 4, 6),
    "[4,2]<=[2,2,2]T(2,1,0)": (0, 4),
    "mesh['a'=2,'b'=4] {'b'}": (0, 1, 2, 3),
    "mesh['a'=2,'b'=2,'c'=2] {'a','c'}": (0, 1, 4, 5),
    "mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}": (0, 2, 4, 6),
    "mesh['a'=8] {'a':(2)2}": (0, 2),
    "mesh['a'=8] {'a':(1)2}": (0, 4),
}


@pytest.mark.parametrize("text", GROUPS)
def test_every_way_to_write_groups_is_read(text: str):
    attributes = f", channel_id=1, replica_groups={text}, use_global_device_ids=true"
    assert devices_of(attributes, MESH) == GROUPS[text]


def test_an_unknown_way_is_refused():
    with pytest.raises(ValueError, match="cannot read the groups"):
        devices_of("replica_groups=<8>", MESH)


def test_a_group_spans_the_axes_along_which_its_devices_differ():
    assert spanned((0, 1), MESH) == ("tensor",)
    assert spanned((0, 2, 4, 6), MESH) == ("data", "fsdp")
    assert spanned((3, 3), MESH) == ()


MODULE = """\
HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%inner_condition (p.0: (s32[], f32[8,4])) -> pred[] {
  %p.0 = (s32[], f32[8,4]{1,0}) parameter(0)
  %i.0 = s32[] get-tuple-element(%p.0), index=0
  %limit.0 = s32[] constant(3)
  ROOT %less.0 = pred[] compare(%i.0, %limit.0), direction=LT
}

%inner_body (p.1: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %p.1 = (s32[], f32[8,4]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  %v.1 = f32[8,4]{1,0} get-tuple-element(%p.1), index=1
  %r.1 = f32[8,4]{1,0} all-reduce(%v.1), replica_groups=[4,2]<=[8], to_apply=%add
  ROOT %t.1 = (s32[], f32[8,4]{1,0}) tuple(%i.1, %r.1)
}

%outer_body (p.2: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %p.2 = (s32[], f32[8,4]{1,0}) parameter(0)
  ROOT %w.2 = (s32[], f32[8,4]{1,0}) while(%p.2), condition=%inner_condition, body=%inner_body
}

ENTRY %main (a: bf16[4,16], b: (s32[], f32[8,4])) -> (bf16[8,16], f32[4,4], bf16[8,16]) {
  %a = bf16[4,16]{1,0} parameter(0)
  %b = (s32[], f32[8,4]{1,0}) parameter(1)
  %zero = s32[] constant(0)
  %g.1 = bf16[8,16]{1,0} all-gather(%a), channel_id=1, replica_groups={{0,2},{1,3},{4,6},{5,7}}, dimensions={0}, metadata={op_name="jit(step)/dot_general"}
  %g.2 = bf16[8,16]{1,0} all-gather(%a), channel_id=2, replica_groups=[4,2]<=[2,2,2]T(0,2,1), dimensions={0}
  %dead = bf16[8,16]{1,0} all-gather(%a), channel_id=3, replica_groups=[4,2]<=[8], dimensions={0}
  %w.3 = (s32[], f32[8,4]{1,0}) while(%b), condition=%inner_condition, body=%outer_body, backend_config={"known_trip_count":{"n":"5"}}
  %v.3 = f32[8,4]{1,0} get-tuple-element(%w.3), index=1
  %r.3 = f32[8,4]{1,0} all-reduce(%v.3), replica_groups=[4,2]<=[4,2]T(1,0), to_apply=%add
  %c.3 = f32[8,4]{1,0} copy(%r.3)
  %s.3 = f32[4,4]{1,0} dynamic-slice(%c.3, %zero, %zero), dynamic_slice_sizes={4,4}
  %moved = bf16[8,16]{1,0} collective-permute(%g.2), source_target_pairs={{0,0},{1,4},{4,1}}
  ROOT %out = (bf16[8,16]{1,0}, f32[4,4]{1,0}, bf16[8,16]{1,0}) tuple(%g.1, %s.3, %moved)
}
"""  # noqa: E501


def test_a_module_is_read_as_it_runs():
    gather, scattered, permuted, inner = collectives(MODULE, MESH)
    assert gather == Collective(
        "all-gather", "bf16", 8 * 16 * 2, 2, ("fsdp",), 1, "jit(step)/dot_general"
    )
    assert (inner.kind, inner.count, inner.axes) == ("all-reduce", 5 * 3, ("tensor",))
    assert (scattered.kind, scattered.bytes, scattered.axes) == (
        "reduce-scatter", 8 * 4 * 4, ("fsdp",)
    )  # fmt: skip
    assert (permuted.kind, permuted.axes) == ("collective-permute", ("data", "tensor"))
    # What one device sends around a ring: an all-reduce twice what a gather or a scatter sends.
    assert gather.sent == 8 * 16 * 2 / 2
    assert inner.sent == 15 * 2 * 8 * 4 * 4 / 2
    assert scattered.sent == 8 * 4 * 4 / 2
    assert permuted.sent == 8 * 16 * 2


def test_a_sum_that_is_used_whole_is_not_scattered():
    whole = MODULE.replace("tuple(%g.1, %s.3, %moved)", "tuple(%g.1, %s.3, %moved, %r.3)")
    assert {one.kind for one in collectives(whole, MESH)} == {
        "all-gather", "all-reduce", "collective-permute"
    }  # fmt: skip


def test_a_loop_that_does_not_say_how_often_it_runs_is_refused():
    with pytest.raises(ValueError, match="how often the loop w"):
        collectives(MODULE.replace("direction=LT", "direction=NE"), MESH)
    with pytest.raises(ValueError, match="no ENTRY"):
        collectives(MODULE.replace("ENTRY ", ""), MESH)


def programs() -> list[str]:
    """The compiled text of small programs with collectives that are written out, on 8 devices."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import AxisType
    from jax.sharding import PartitionSpec as P

    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)

    def text(function, out: P) -> str:
        mapped = jax.shard_map(function, mesh=mesh, in_specs=P("data", "fsdp"), out_specs=out,
                               check_vma=False)  # fmt: skip
        x = jax.ShapeDtypeStruct((16, 32), jnp.float32)
        return jax.jit(mapped).lower(x).compile().as_text()

    def summed_often(x):
        add = lambda total, _: (jnp.sin(jax.lax.psum(total, "data")), None)
        return jax.lax.scan(add, x, None, length=5)[0]

    gathered = lambda x: jax.lax.all_gather(x, "fsdp", axis=1, tiled=True)
    scattered = lambda x: jax.lax.psum_scatter(x, "fsdp", scatter_dimension=0, tiled=True)
    turned = lambda x: jax.lax.all_to_all(x, "fsdp", 1, 0, tiled=True)
    return [
        text(summed_often, P("data", "fsdp")),
        text(gathered, P("data", None)),
        text(scattered, P(("data", "fsdp"), None)),
        text(turned, P(("data", "fsdp"), None)),
    ]


def test_what_jax_compiles_is_read():
    """Programs of which one knows what they send, each device holding f32[8, 8]."""
    done = subprocess.run(
        [sys.executable, __file__],
        env={
            **os.environ,
            "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(Path(lmjax.__file__).parents[1]),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = [
        [(c.kind, c.axes, c.group, c.count, c.bytes) for c in collectives(text, mesh)]
        for text, mesh in zip(json.loads(done.stdout), [{"data": 2, "fsdp": 4}] * 4, strict=True)
    ]
    assert found == [
        [("all-reduce", ("data",), 2, 5, 256)],
        [("all-gather", ("fsdp",), 4, 1, 1024)],
        [("reduce-scatter", ("fsdp",), 4, 1, 256)],
        [("all-to-all", ("fsdp",), 4, 1, 256)],
    ]


if __name__ == "__main__":
    print(json.dumps(programs()))
