"""Every Triton kernel against torch in fp32, run by Triton's interpreter: no GPU is needed, and none is faster for it.

What only a GPU shows, bf16 and the engine as a whole, is in `tests/gpu`.
"""

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

from qlora_core.training.engine import ops
from qlora_core.training.engine.kernels import cross_entropy, dequantize, dropped, elementwise, gated, products
from qlora_core.training.engine.operands import Behind, Lift, Masks
from qlora_core.training.engine.weights import Gptq
from tests.quantized import pack_gptq

TOKENS, WIDTH, RANK, EPS = 20, 200, 8, 1e-6


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def close(got, expected) -> None:
    """Single tensors or sequences of them; Nones stand for what a kernel gives nothing for."""
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def same_but_for_rounding(got: torch.Tensor, exact: torch.Tensor) -> None:
    """The 16-bit form of a value is the nearest or the one beside it."""
    tolerance = 1e-4 if got.dtype == torch.float32 else 1e-3
    torch.testing.assert_close(got.float(), exact, rtol=tolerance, atol=1e-4)


def both(kernel, reference, *tensors: torch.Tensor) -> None:
    """What the two return, and what they leave in their arguments, is the same."""
    mine, theirs = ([t.clone() for t in tensors] for _ in range(2))
    made, expected = kernel(*mine), reference(*theirs)
    if expected is not None:
        close(made, expected)
    close(mine, theirs)


def test_norms():
    h, d, grad = torch.randn(3, TOKENS, WIDTH)
    weight = torch.rand(WIDTH) + 0.5
    both(lambda h, w: elementwise.rms_norm(h, w, EPS), lambda h, w: ops.rms_norm(h, w, EPS), h, weight)
    summed, normed = elementwise.add_rms_norm(h, d.clone(), weight, EPS)
    close([summed, normed], list(ops.add_rms_norm(h, d.clone(), weight, EPS)))
    both(
        lambda h, w, g, r: elementwise.rms_norm_backward(h, w, EPS, g, r),
        lambda h, w, g, r: ops.rms_norm_backward(h, w, EPS, g, r),
        h, weight, grad, d,
    )  # fmt: skip


@pytest.mark.parametrize("normed", [False, True])
def test_rotary_embedding(normed):
    angle = torch.randn(TOKENS, 16)
    cos, sin = torch.cat([angle.cos()] * 2, 1), torch.cat([angle.sin()] * 2, 1)
    qkv, norms = torch.randn(TOKENS, 8 * 32), tuple(torch.rand(2, 32) + 0.5) if normed else None

    def rotated(function):
        out = torch.zeros(TOKENS, 6 * 32)
        function(qkv, out, cos, sin, norms, EPS, 4, 2)
        return out

    close(rotated(elementwise.rotate), rotated(ops.rotate))
    grads, raw = tuple(torch.randn(TOKENS, heads, 32) for heads in (4, 2, 2)), qkv if normed else None
    back = [f(grads, raw, cos, sin, norms, EPS) for f in (elementwise.rotate_backward, ops.rotate_backward)]
    close(*back)


@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize("lifted", [False, True])
@pytest.mark.parametrize("apart", [False, True])
def test_gated_activation_and_the_adapter_behind_it(apart, lifted, rate):
    shapes = (70, 600), (RANK, 300), (70, 300), (70, RANK), (70, 2 * RANK), (600, RANK)  # more than one tile of each
    gate_up, a, grad, low_grad, lift_low, lift_b = (torch.randn(*shape) for shape in shapes)
    masks = Masks(torch.tensor([5]), 2, 1, rate) if rate else None
    lift = Lift(lift_low, lift_b) if lifted else None
    whole = gate_up.clone()
    if lifted:
        whole[:, :300] += lift_low[:, :RANK] @ lift_b[:300].t()
        whole[:, 300:] += lift_low[:, RANK:] @ lift_b[300:].t()
    mask = dropped.dropout(torch.ones(70, 300), masks, None) if masks else 1.0
    inner, _ = ops.swiglu(whole, None, None, None)
    close(list(gated.swiglu_low(gate_up, a, masks, lift)), [inner, (inner * mask) @ a.t()])

    grad_a, expected = torch.ones(RANK, 300), whole.clone()
    full_grad = grad + (low_grad @ a) * mask if apart else grad
    ops.swiglu_backward(full_grad.clone(), expected, None, None)
    gated.swiglu_backward(grad, gate_up, Behind(low_grad, a if apart else None, grad_a, masks), lift)
    close([gate_up, grad_a], [expected, 1 + low_grad.t() @ (inner * mask)])


def test_gated_activation_without_an_adapter_behind_it():
    gate_up, grad = torch.randn(70, 600), torch.randn(70, 300)
    close(gated.swiglu(gate_up), ops.swiglu(gate_up, None, None, None)[0])
    both(
        lambda g, x: gated.swiglu_backward(g, x, None, None),
        lambda g, x: ops.swiglu_backward(g, x, None, None),
        grad, gate_up,
    )  # fmt: skip


@pytest.mark.parametrize("rank", [RANK, 40])
@pytest.mark.parametrize(
    "parts",
    [
        (slice(None),),
        (slice(0, 200), slice(200, 520)),
        (slice(3, 90), slice(90, 120), slice(400, 520)),
        (slice(0, None, 2), slice(1, None, 2)),
    ],
    ids=["one", "two", "three", "interleaved"],
)
def test_both_products_of_adapters_read_the_wide_matrix_once(parts, rank):
    x, rows = torch.randn(300, 520), sum(len(range(*part.indices(520))) for part in parts)
    m, u = torch.randn(rows, rank), torch.randn(300, len(parts) * rank)
    low, grad = torch.empty(300, len(parts) * rank), torch.ones(rows, rank)
    expected_low, expected_grad = low.clone(), grad.clone()
    products.both_sides(x, m, u, low, grad, 0.5, parts)
    ops.both_sides(x, m, u, expected_low, expected_grad, 0.5, parts)
    close([low, grad], [expected_low, expected_grad])
    first = x[:, parts[0]]
    close(low[:, :rank], first @ m[: first.shape[1]])
    close(grad[-1], 1 + 0.5 * x[:, -1] @ u[:, -rank:])
    lying_low, lying = torch.empty_like(low), torch.ones(rank, rows)
    products.both_sides(x, m.t().contiguous().t(), u, lying_low, lying.t(), 0.5, parts)
    close([lying_low, lying.t()], [low, grad])


def test_cross_entropy():
    both(cross_entropy.cross_entropy, ops.cross_entropy, torch.randn(9, 9000), torch.randint(-1, 9000, (9,)))


def test_dropout_keeps_its_share_and_its_mask():
    x, masks = torch.ones(TOKENS, WIDTH), Masks(torch.zeros(1, dtype=torch.int64), 0, 2, 0.25)
    first, again, other = (dropped.dropout(x, masks.each()[number], None) for number in (0, 0, 1))
    close(first, again)
    assert not torch.equal(first, other)
    assert first.unique().tolist() == [0.0, pytest.approx(1 / 0.75)]
    assert (first > 0).float().mean() == pytest.approx(0.75, abs=0.02)
    close(dropped.dropout(x, masks, x.clone()), x + first)


def test_dropout_masks_are_not_alike():
    """Neither the masks of a step nor those of two steps, nor a mask and itself a place or a row further on."""
    x, rate = torch.ones(400, WIDTH), 0.25
    masks = [
        dropped.dropout(x, Masks(torch.tensor([seed]), number, 1, rate), None) > 0
        for seed in (0, 1)
        for number in (0, 1, 2)
    ]
    masks += [masks[0].roll(shift, dims) for shift, dims in ((1, 1), (1, 0), (16, 1))]
    chance, both = (1 - rate) ** 2, torch.stack([mask.flatten() for mask in masks]).float()
    together = both @ both.t() / both.shape[1]
    off_diagonal = together[~torch.eye(len(masks), dtype=torch.bool)]
    assert (off_diagonal - chance).abs().max() < 5 * (chance * (1 - chance) / both.shape[1]) ** 0.5


@pytest.mark.parametrize("rank", [RANK, 64])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_products_of_adapters_with_what_dropout_leaves(count, rank):
    x, a = torch.randn(150, WIDTH), torch.randn(count * rank, WIDTH)
    masks = Masks(torch.tensor([7]), 3, count, 0.3)
    kept = [dropped.dropout(torch.ones_like(x), mask, None) for mask in masks.each()]
    parts = [(x * mask, first, mask) for mask, first in zip(kept, a.chunk(count), strict=True)]
    close(dropped.dropped_low(x, a, masks), torch.cat([left @ first.t() for left, first, _ in parts], 1))
    low_grad, input_grad, grad_a = torch.randn(150, count * rank), torch.randn(150, WIDTH), torch.ones_like(a)
    lows = low_grad.chunk(count, dim=1)
    expected_a = 1 + torch.cat([low.t() @ left for low, (left, _, _) in zip(lows, parts, strict=True)])
    expected_input = input_grad + sum(low @ first * mask for low, (_, first, mask) in zip(lows, parts, strict=True))
    dropped.low_backward(Behind(low_grad, a, grad_a, masks), masks, x, input_grad)
    close([grad_a, input_grad], [expected_a, expected_input])
    alone = torch.ones_like(a)
    dropped.low_backward(Behind(low_grad, None, alone, masks), masks, x, None)
    close(alone, expected_a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_4bit_weights_with_the_adapter_added(kind, nested, dtype):
    weight, a, b = torch.randn(130, 192), torch.randn(RANK, 192).to(dtype), torch.randn(130, RANK).to(dtype)
    packed, state = quantize_4bit(weight, quant_type=kind, compress_statistics=nested)
    inner = state.state2
    scales = (inner.code, inner.absmax, state.offset, inner.blocksize) if nested else None
    expected = dequantize_4bit(packed, state)
    for pair, added in (((None, None), 0), ((a, b), b.float() @ a.float())):
        every_other = torch.full((260, 192), torch.nan, dtype=dtype)
        out = every_other[::2]
        dequantize.dequantize_4bit(packed, state.absmax, scales, state.code, *pair, out)
        same_but_for_rounding(out, expected + added)
        assert every_other[1::2].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("group", [32, 128, "shuffled"])
@pytest.mark.parametrize("bits", [4, 8])
def test_gptq_weights_with_the_adapter_added(bits, group, dtype):
    a, b = torch.randn(RANK, 256), torch.randn(96, RANK)
    parts = pack_gptq(torch.randn(96, 256), bits, group=32 if group == "shuffled" else group)
    if group == "shuffled":
        parts["g_idx"] = parts["g_idx"][torch.randperm(256)]
    stored = Gptq(
        parts["qweight"], parts["scales"], parts["qzeros"], parts["g_idx"], 0 if group == "shuffled" else group, bits,
        zero_offset=1,
    )  # fmt: skip
    expected = torch.empty(96, 256)
    stored.fill(expected, a.to(dtype).float(), b.to(dtype).float())
    out = torch.full((192, 256), torch.nan, dtype=dtype)[1::2]
    dequantize.dequantize_gptq(
        stored.packed, stored.scales, stored.zeros, stored.groups, stored.group_size, bits, stored.zero_offset,
        a.to(dtype), b.to(dtype), out,
    )  # fmt: skip
    same_but_for_rounding(out, expected)
