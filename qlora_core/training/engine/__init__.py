"""The fused training engine: forward and backward of an adapted decoder, written out instead of recorded by autograd.

Read in this order: `families` (what a block is made of), `pack` (what goes in), `weights` and `linear` (4-bit weights
with their adapters), `ops` and `kernels/` (everything between the matrix products), `engine` (one pass), `graphs`
(replaying it).
"""
