"""What a compiled program sends, read from its text: loops, and TPU's fused collectives."""

import pytest

from wanjax.planning import wire

GATHER = "all-gather(%p), channel_id=1, replica_groups=[1,8]<=[8], dimensions={0}"
LOOP = f"""HloModule jit_step

%body (p: bf16[8,4]) -> bf16[64,4] {{
  %all-gather.1 = bf16[64,4]{{1,0}} {GATHER}
}}

%condition (p: bf16[8,4]) -> pred[] {{
  %c = s32[] constant(40)
}}

ENTRY %main (p: bf16[8,4]) -> bf16[64,4] {{
  %w = bf16[64,4]{{1,0}} while(%p), condition=%condition, body=%body
  ROOT %permute = f32[16]{{0}} collective-permute(%p), source_target_pairs={{{{0,1}}}}
}}
"""
FUSED = f"""HloModule jit_step

%fused_computation.1 (p: bf16[8,4]) -> bf16[64,4] {{
  %all-gather.1 = bf16[64,4]{{1,0}} {GATHER}
  ROOT %custom-call.1 = bf16[64,4]{{1,0}} custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}}

%async_collective_fusion.2 (p: bf16[8,4]) -> bf16[64,4] {{
  %all-gather.2 = bf16[64,4]{{1,0}} {GATHER}
}}

%fused_computation.3 (p: bf16[8,4]) -> bf16[64,4] {{
  %all-gather.3 = bf16[64,4]{{1,0}} {GATHER}
  ROOT %custom-call.3 = bf16[64,4]{{1,0}} custom-call(%all-gather.3), custom_call_target="AsyncCollectiveDone"
}}

ENTRY %main (p: bf16[8,4]) -> bf16[64,4] {{
  %start = bf16[64,4]{{1,0}} fusion(%p), kind=kCustom, calls=%fused_computation.1
  %on = bf16[64,4]{{1,0}} fusion(%p), kind=kCustom, calls=%async_collective_fusion.2
  ROOT %done = bf16[64,4]{{1,0}} fusion(%p), kind=kCustom, calls=%fused_computation.3
}}
"""  # noqa: E501
ONCE = 64 * 4 * 2 * 7 / 8


@pytest.mark.parametrize(
    "text, sent",
    [
        (LOOP, {"all-gather": 40 * ONCE, "collective-permute": 64}),
        (FUSED, {"all-gather": ONCE}),
        (FUSED.replace("async_collective_fusion", "fused_computation"), {"all-gather": 2 * ONCE}),
    ],
    ids=["a loop", "a TPU's overlapped gather", "two gathers"],
)
def test_bytes_sent(text, sent):
    assert dict(wire.sent(text)) == sent
