"""Counting a kernel's instructions along the shortest way."""

from __future__ import annotations

import pytest

from tests.benchmarks import sass

# A program that streams tiles: a loop of four instructions in a loop, a branch for rare tiles, a
# wait that is moved out of the way, and code after the last tile.
STREAM = """
.text.kernel:
        /*0000*/                   S2R R0, SR_TID.X ;
.L_x_0:
        /*0010*/                   MOV R1, R2 ;
.L_x_1:
        /*0020*/                   SYNCS.TRYWAIT P0, [UR4], R3 ;
        /*0030*/              @!P0 BRA `(.L_x_4) ;
.L_x_2:
        /*0040*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR16], R24, gsb0 ;
        /*0050*/               @P1 BRA `(.L_x_1) ;
        /*0060*/                   FFMA R4, R5, R6, R7 ;
        /*0070*/                   BRA P3, `(.L_x_3) ;
        /*0080*/                   FSEL R4, R4, -INF , P2 ;
        /*0090*/                   FSEL R5, R5, -INF , P2 ;
.L_x_3:
        /*00a0*/                   MUFU.EX2 R4, R4 ;
        /*00b0*/               @P0 BRA `(.L_x_0) ;
        /*00c0*/                   STG.E desc[UR6][R8.64], R4 ;
        /*00d0*/                   EXIT ;
.L_x_4:
        /*00e0*/                   SYNCS.TRYWAIT P0, [UR4], R3 ;
        /*00f0*/              @!P0 BRA `(.L_x_4) ;
        /*0100*/                   BRA `(.L_x_2) ;
"""


def test_a_streamed_tile_is_counted_from_one_main_loop_to_the_next():
    # MOV, then FFMA, BRA, MUFU and BRA; neither FSEL nor the wait.
    assert sass.instructions(STREAM) == (4, 5)


def test_a_single_tile_is_counted_from_entry_to_exit():
    single = STREAM.replace("               @P0 BRA `(.L_x_0) ;", "                   NOP ;")
    # S2R and MOV before; FFMA, BRA, MUFU, NOP, STG and EXIT after.
    assert sass.instructions(single) == (4, 8)


def test_code_without_a_main_loop_is_refused():
    with pytest.raises(ValueError, match="no loop around the products"):
        sass.instructions(
            STREAM.replace("@P1 BRA `(.L_x_1)", "@P1 BRA `(.L_x_3)").replace(
                "@P0 BRA `(.L_x_0)", "NOP"
            )
        )
