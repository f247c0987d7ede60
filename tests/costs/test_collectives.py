"""What is read from compiled programs, against programs whose collectives are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from lsgd_jax.costs.collectives import Collective, collectives
from tests.mapping import GROUPS, WORKERS, mapped

EVERYONE = ("group", "worker")


def compiled(function, *shape, dtype=np.float32):
    return collectives(
        mapped(function, "shard_map").lower(jnp.ones((GROUPS, WORKERS, *shape), dtype)).compile().as_text()
    )


def ring(x):
    return lax.ppermute(x, "worker", [(i, (i + 1) % WORKERS) for i in range(WORKERS)])


@pytest.mark.parametrize(
    ("function", "kind", "size", "group_size", "sent"),
    [
        (lambda x: lax.psum(x, "worker"), "all-reduce", 480, 4, 720),
        (lambda x: lax.psum(x, EVERYONE), "all-reduce", 480, 8, 840),
        (lambda x: lax.pmax(x, "group"), "all-reduce", 480, 2, 480),
        (lambda x: lax.all_gather(x, "worker"), "all-gather", 1920, 4, 1440),
        (lambda x: lax.psum_scatter(x, "worker", tiled=True), "reduce-scatter", 480, 4, 360),
        (ring, "collective-permute", 480, 4, 480),
        (lambda x: lax.ppermute(x, EVERYONE, [(0, 3), (3, 5)]), "collective-permute", 480, 3, 320),
        (lambda x: lax.all_to_all(x.reshape(4, 30), "worker", 0, 0), "all-to-all", 480, 4, 360),
    ],
)
def test_every_kind_with_its_size_and_group(function, kind, size, group_size, sent):
    [one] = compiled(function, 120)
    assert one == Collective(kind, size, group_size, senders=2 if sent == 320 else None)
    assert one.sent == sent


@pytest.mark.parametrize(("dtype", "size"), [(np.int8, 1), (np.uint16, 2), (np.int32, 4), (bool, 1)])
def test_the_size_of_every_dtype(dtype, size):
    assert compiled(ring, 120, dtype=dtype) == [Collective("collective-permute", 120 * size, 4)]


def test_several_arrays_in_one_collective_add_up():
    found = compiled(lambda x: (lax.psum(x, "worker"), lax.psum(x[:7] * 2, "worker")), 120)
    assert sum(each.bytes for each in found) == 480 + 28


def test_fusions_of_one_channel_are_stages_of_one_collective():
    """As a TPU's compiler writes an asynchronous one; another computation may have the channel, too."""
    fusions = {"start": 1, "stage": 1, "done": 1, "alone": 2}
    fused = "".join(
        f"""
%{name} (p: f32[10]) -> f32[40] {{
  %p = f32[10] parameter(0)
  ROOT %gathered = f32[40] all-gather(%p), channel_id={channel}, replica_groups=[2,4]<=[8], dimensions={{0}}
}}
"""
        for name, channel in fusions.items()
    )
    body = "".join(f"  %{name}.0 = f32[40] fusion(%x), kind=kCustom, calls=%{name}\n" for name in fusions)
    called = f"\n%called (x: f32[10]) -> f32[40] {{\n  %x = f32[10] parameter(0)\n{body}}}\n"
    entry = f"\nENTRY %main (x: f32[10]) -> f32[40] {{\n  %x = f32[10] parameter(0)\n{body}"
    entry += "  ROOT %call = f32[40] call(%x), to_apply=%called\n}\n"
    found = collectives(f"HloModule example, num_partitions=8\n{fused}{called}{entry}")
    assert found == [Collective("all-gather", 160, 4)] * 4  # Two here, and two in what is called.


def test_loops_multiply_and_branches_are_told():
    def function(x):
        def often(_, x):
            return lax.fori_loop(0, 3, lambda _, x: ring(x) + 1, x)

        x = lax.fori_loop(0, 5, often, x)
        return lax.cond(x.sum() > 0, ring, lambda x: x, x)

    assert compiled(function, 120) == [
        Collective("collective-permute", 480, 4, times=15),
        Collective("collective-permute", 480, 4, conditional=True),
    ]


def test_a_loop_of_unknown_length():
    found = compiled(lambda x: lax.while_loop(lambda x: lax.pmax(x.sum(), "worker") < 9, ring, x), 120)
    assert {(each.kind, each.times) for each in found} == {("all-reduce", None), ("collective-permute", None)}


def test_the_text_of_accelerators():
    """Tiled layouts, asynchronous pairs and groups as products, as they are printed for TPUs and GPUs."""
    text = """HloModule jit_step, is_scheduled=true, num_partitions=16

%wrapped (p.1: u32[1024]) -> u32[64] {
  %p.1 = u32[1024]{0:T(1024)} parameter(0)
  ROOT %scattered = u32[64]{0:T(128)} reduce-scatter(%p.1), channel_id=4, replica_groups={}, dimensions={0}
}

ENTRY %main (x.1: u32[64,128], y: u16[1024]) -> u32[64] {
  %x.1 = u32[64,128]{1,0:T(8,128)S(1)} parameter(0)
  %y = u16[1024]{0:T(1024)(128)(2,1)} parameter(1)
  %z = u32[1024]{0:T(1024)} convert(%y)
  %r = (u32[64,128]{1,0:T(8,128)}, u16[1024]{0}) all-reduce-start(%x.1, %y), channel_id=1, replica_groups=[4,4]<=[16]
  %d = (u32[64,128]{1,0:T(8,128)}, u16[1024]{0:T(1024)}) all-reduce-done(%r)
  %g = (u16[1024]{0}, u16[8192]{0}) all-gather-start(%y), channel_id=2, replica_groups=[2,8]<=[8,2]T(1,0)
  %h = u16[8192]{0} all-gather-done(%g)
  %s = (u16[1024]{0}, u16[1024]{0}) collective-permute-start(%y), channel_id=3, source_target_pairs={{0,1},{1,0}}
  %t = u16[1024]{0} collective-permute-done(%s)
  %a = ((u32[1024]{0}), u32[64]{0}) async-start(%z), calls=%wrapped
  ROOT %b = u32[64]{0} async-done(%a)
}
"""
    assert collectives(text) == [
        Collective("all-reduce", 64 * 128 * 4 + 2048, 4),
        Collective("all-gather", 8 * 2048, 8),
        Collective("collective-permute", 2048, 2),
        Collective("reduce-scatter", 4096, 16),
    ]


def test_one_device_sends_nothing_and_other_text_is_refused():
    assert collectives(jax.jit(lambda x: x + 1).lower(1.0).compile().as_text()) == []
    with pytest.raises(ValueError, match="no ENTRY computation"):
        collectives("what is this")


def test_loops_that_only_their_condition_counts_as_the_tpu_compiler_writes_them():
    text = """
HloModule counted, num_partitions=4

%body (carry: (s32[], f32[8])) -> (s32[], f32[8]) {
  %carry = (s32[]{:T(128)}, f32[8]{0:T(128)}) parameter(0)
  %at = s32[]{:T(128)} get-tuple-element(%carry), index=0
  %here = s32[]{:T(128)} copy(%at)
  %one = s32[]{:T(128)} constant(1), metadata={op_name="one"}
  %next = s32[]{:T(128)} add(%here, %one), metadata={op_name="add"}
  %x = f32[8]{0:T(128)} get-tuple-element(%carry), index=1
  %sum = f32[8]{0:T(128)} all-reduce(%x), replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %tuple = (s32[]{:T(128)}, f32[8]{0:T(128)}) tuple(%next, /*index=1*/%sum)
}

%condition (carry: (s32[], f32[8])) -> pred[] {
  %end = s32[]{:T(128)} constant(7)
  %carry = (s32[]{:T(128)}, f32[8]{0:T(128)}) parameter(0)
  %at = s32[]{:T(128)} get-tuple-element(%carry), index=0
  ROOT %less = pred[]{:T(512)} compare(%at, %end), direction=LT
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0:T(128)} parameter(0)
  %start = s32[]{:T(128)} constant(START)
  %copied = s32[]{:T(128)} copy(%start)
  %tuple = (s32[]{:T(128)}, f32[8]{0:T(128)}) tuple(%copied, %x)
  %loop = (s32[]{:T(128)}, f32[8]{0:T(128)}) while(%tuple), condition=%condition, body=%body
  ROOT %result = f32[8]{0:T(128)} get-tuple-element(%loop), index=1
}
"""
    assert collectives(text.replace("START", "2")) == [Collective("all-reduce", 32, 4, times=5)]
    assert collectives(text.replace("constant(START)", "parameter(1)")) == [Collective("all-reduce", 32, 4, times=None)]
    by_twos = text.replace("START", "2").replace("constant(1)", "constant(2)")
    assert collectives(by_twos) == [Collective("all-reduce", 32, 4, times=None)]
