"""Programs of accelerators read as text: lines as the compilers write them, with groups and bytes counted by hand."""

from types import SimpleNamespace

import pytest

from saejax.training import program

MESH = SimpleNamespace(shape={"data": 2, "latent": 2}, size=4)
HEADER = "ENTRY %main.1 (p: f32[8]) -> f32[8] {\n"


@pytest.mark.parametrize("groups, axes", [
    ("{{0,1},{2,3}}", ("latent",)),
    ("{{0,2},{1,3}}", ("data",)),
    ("[2,2]<=[4]", ("latent",)),
    ("[2,2]<=[2,2]T(1,0)", ("data",)),
    ("[1,4]<=[4]", ("data", "latent")),
    ("mesh['axis_0'=2,'axis_1'=2], device_ids=([2,2]T(1,0)) {'axis_0'}", ("latent",)),
    ("mesh['axis_0'=2,'axis_1'=2], device_ids=([2,2]T(1,0)) {'axis_1'}", ("data",)),
    ("mesh['axis_0'=2,'axis_1'=1,'axis_2'=2] {'axis_0'}", ("data",)),
])  # fmt: skip
def test_collectives_lie_along_their_axes(groups, axes):
    line = f"  %r = f32[4,8]{{1,0}} all-reduce(%a), channel_id=1, replica_groups={groups}, to_apply=%add\n"
    (found,) = program.collectives(HEADER + line + "}", MESH)  # pyright: ignore[reportArgumentType]
    assert found == program.Collective("all-reduce", axes, 4 * 8 * 4, False)


def test_a_started_gather_counts_its_result_and_aux_k_is_told_apart():
    types = "((s32[3,2]{1,0}, f32[2,3]{1,0}), (s32[6,2]{1,0}, f32[4,3]{1,0}))"
    named = 'metadata={op_name="jit(step)/aux_k/while/body/add"}'
    lines = [
        f"  %g = {types} all-gather-start(%a, %b), replica_groups={{{{0,1}},{{2,3}}}}",
        f"  %r = f32[10]{{0}} all-reduce-start(%c), replica_groups={{{{0,2}},{{1,3}}}}, {named}",
        "  %d = f32[10]{0} all-reduce-done(%r)",
    ]
    text = HEADER + "\n".join([*lines, "}"])
    gather, reduce = program.collectives(text, MESH)  # pyright: ignore[reportArgumentType]
    assert gather == program.Collective("all-gather", ("latent",), 4 * 12 + 4 * 12, False)
    assert reduce == program.Collective("all-reduce", ("data",), 40, True)


def test_costly_operations_are_found_inside_fusions_too():
    text = """%fused.1 (p: f32[8]) -> f32[8] {
  %s = f32[16,4]{1,0} scatter(%a, %b, %c), indices_are_sorted=false, to_apply=%add
  ROOT %u = f32[16,4]{1,0} scatter(%s, %b, %c), unique_indices=true, to_apply=%add
}
ENTRY %main (p: f32[8]) -> f32[8] {
  %f = f32[16,4]{1,0} fusion(%p), kind=kInput, calls=%fused.1, backend_config={"estimated_cycles":"7"}
  %o = (f32[2,16]{1,0}, s32[2,16]{1,0}) sort(%f, %i), dimensions={1}
  %c = f32[4,16]{0,1} copy(%f), metadata={op_name="jit(step)/aux_k/while"}
  %b = u16[16,4]{0,1} copy(%buffer)
  %h = f32[2,3,4]{2,1,0} gather(%f, %i)
}"""
    found = program.costly(text, widths={16}, weights={64}, gathered={(2, 24)})
    assert found == {"scatters": 1, "sorts": 1, "copies (AuxK)": 1, "gathered rows": 1}
    assert program.cycles(text) == 7
