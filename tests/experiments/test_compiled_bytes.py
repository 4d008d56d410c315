"""The bytes that a compiled program moves, read from its text."""

import pytest

from stca_jax.experiments.benchmarks.compiled_bytes import moved

HLO = """
HloModule jit_step

%fused (param: f32[4,8]) -> f32[4] {
  %param = f32[4,8]{1,0} parameter(0)
  ROOT %reduce.1 = f32[4]{0} reduce(%param), dimensions={1}, to_apply=%add
}

%command_buffer (p: f32[4,8]) -> bf16[4] {
  %p = f32[4,8]{1,0} parameter(0)
  %fusion.1 = f32[4]{0} fusion(%p), kind=kInput, calls=%fused, metadata={op_name="jit(step)/sum"}
  ROOT %convert.1 = bf16[4]{0} convert(%fusion.1)
}

ENTRY %main (x: f32[4,8]) -> (bf16[4], pred[3]) {
  %x = f32[4,8]{1,0} parameter(0), metadata={op_name="x"}
  %call.1 = bf16[4]{0} call(%x), to_apply=%command_buffer
  %kernel = (s32[2]{0}, pred[3]{0}) custom-call(%x, %call.1), custom_call_target="triton"
  %first = s32[2]{0} get-tuple-element(%kernel), index=0
  %second = pred[3]{0} get-tuple-element(%kernel), index=1
  %copy-start.1 = (s32[2]{0}, s32[2]{0}, u32[]) copy-start(%first)
  %copy-done.1 = s32[2]{0} copy-done(%copy-start.1)
  ROOT %tuple = (bf16[4]{0}, pred[3]{0}) tuple(%call.1, %second)
}
"""


def test_operands_and_results_of_every_instruction():
    assert [(m.name, m.bytes) for m in moved(HLO)] == [
        ("%fusion.1 jit(step)/sum", 4 * 8 * 4 + 4 * 4),
        ("%convert.1 ", 4 * 4 + 4 * 2),
        ("%kernel ", 4 * 8 * 4 + 4 * 2 + 2 * 4 + 3),
        ("%copy-done.1", 2 * 2 * 4),
    ]


def test_loops_are_refused():
    loop = HLO.replace("call(%x), to_apply", "while(%x), condition=%command_buffer, body")
    with pytest.raises(ValueError, match=r"%call.1 is a while: .* how often it runs"):
        moved(loop)
