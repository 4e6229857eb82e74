"""Loss and adapter gradients of one pack: a forward and a backward pass over the blocks, written out.

What a block keeps for its backward, per token: the residual stream twice, queries, keys and values, attention's
output, and gate and up. Norms and the gated activation are computed again where they are needed; they cost one pass
over memory, and keeping them would cost half as much memory again.
"""

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from qlora_core.training.engine import ops
from qlora_core.training.engine.adapter import FlatAdapter, Pair
from qlora_core.training.engine.attention import Attended, attend, attend_backward
from qlora_core.training.engine.beside import Beside
from qlora_core.training.engine.blocks import Block, Context, Kept, read_blocks
from qlora_core.training.engine.families import adapted_linears, shape_of
from qlora_core.training.engine.linear import Group
from qlora_core.training.engine.offload import HostMemory
from qlora_core.training.engine.operands import Behind
from qlora_core.training.engine.pack import Pack
from qlora_core.training.engine.quack import Quack
from qlora_core.training.pass_memory import ActivationMemory, logit_rows

NEAR_THE_END = 2
"""Blocks at the end of the forward that keep everything, because their backward comes at once."""


class Engine:
    """Forward and backward of an adapted model on packs.

    Args:
        model: adapted by PEFT; `families.why_not` must have no objection.
        dtype: of the matrix products.
        activation_memory: `fast` keeps what blocks computed, `balanced` computes gate and up again, `small` holds the
            rest in host memory on CUDA, and on a CPU computes everything again from the block's input.
    """

    def __init__(self, model: PeftModel, dtype: torch.dtype, activation_memory: ActivationMemory = "fast") -> None:
        base: PreTrainedModel = model.get_base_model()
        decoder = base.get_decoder()
        self.adapter = FlatAdapter(adapted_linears(base), dtype)
        self.shape = shape_of(base.config)
        self.dtype, self.activation_memory = dtype, activation_memory
        self._embedding = base.get_input_embeddings().weight.detach()
        self._head = base.get_output_embeddings().weight.detach()
        self._final_norm = decoder.norm.weight.detach()
        self._rotary = decoder.rotary_emb
        self._quack = Quack(dtype, self.shape.hidden, len(self._head))
        self._blocks = read_blocks(base, self.adapter, dtype, self._quack)
        self._beside = Beside(self._head.device)
        self._host = HostMemory() if activation_memory == "small" and self._head.is_cuda else None

    def groups(self) -> list[Group]:
        """All groups of linears, in the order in which they run."""
        return [group for block in self._blocks for group in (block.qkv, block.o, block.gate_up, block.down)]

    def keep_weights(self, budget_bytes: int, apart: bool = False) -> int:
        """Hold the dequantized weights of as many groups as fit, and say how many those are.

        Each is then made once a step instead of twice a pass; or, with its adapter computed `apart`, only once.
        """
        for number, group in enumerate(self.groups()):
            budget_bytes -= group.bytes
            if budget_bytes < 0:
                return number
            group.keep_apart() if apart else group.keep()
        return len(self.groups())

    def refresh(self) -> None:
        """Take over changed adapter parameters; once after every optimizer step."""
        self.adapter.refresh()
        for group in self.groups():
            group.refresh()

    @torch.no_grad()
    def loss_and_grads(self, pack: Pack, seed: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Add the gradient of the pack's summed loss to the adapter's gradients.

        Args:
            pack: rows, on the model's device.
            seed: int64, one value, on the device: of the dropout masks.
            noise: is added to the embeddings, `[tokens, hidden]` (NEFTune, arXiv:2310.05914).

        Returns:
            The sum of the losses of all targets, 0-d, fp32.
        """
        try:
            return self._pass(pack, seed, noise)
        finally:  # also where memory has run out, so that a graph's recording can end and a smaller pass can follow
            self._beside.join()
            if self._host is not None:
                self._host.join()

    def _pass(self, pack: Pack, seed: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
        self._interleave()
        context, last = self._context(pack, seed), len(self._blocks) - 1
        kept: dict[int, Kept] = {}
        stream, delta = self._embedded(pack, noise), None
        for number, block in enumerate(self._blocks):
            made, delta = self._forward(block, stream, delta, context)
            stream = made.middle  # type: ignore[assignment]  # a forward always has it
            self._keep(kept, number, made)
            del made
        stream, normed = self._end(stream, delta)
        del delta
        loss, normed_grad = self._head_loss(normed, pack)
        del normed
        grad = torch.zeros_like(stream)
        ops.rms_norm_backward(stream, self._final_norm, self.shape.eps, normed_grad, grad)
        del stream, normed_grad
        for number in range(last, -1, -1):
            self._backward(self._blocks[number], self._fetch(kept, number), grad, context, need_input=number > 0)
        return loss

    @torch.no_grad()
    def loss(self, pack: Pack) -> torch.Tensor:
        """Sum of the losses of a pack's targets, 0-d, fp32, without dropout."""
        self._interleave()
        context = self._context(pack, None)
        stream, delta = self._embedded(pack, None), None
        for block in self._blocks:
            made, delta = self._forward(block, stream, delta, context)
            stream = made.middle  # type: ignore[assignment]
            del made
        return self._head_loss(self._end(stream, delta)[1], pack)[0]

    def _embedded(self, pack: Pack, noise: torch.Tensor | None) -> torch.Tensor:
        embedded: torch.Tensor = self._embedding[pack.input_ids]
        return embedded if noise is None else torch.add(embedded, noise)

    def _end(self, stream: torch.Tensor, delta: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        assert delta is not None
        return ops.add_rms_norm(stream, delta, self._final_norm, self.shape.eps)

    def _context(self, pack: Pack, seed: torch.Tensor | None) -> Context:
        cos, sin = self._rotary(self._embedding[:1], pack.position_ids[None])
        return Context(pack, cos[0].contiguous(), sin[0].contiguous(), seed)

    def _interleave(self) -> None:
        """Interleave gate and up where their product can make the activation; that is known between passes."""
        for block in self._blocks:
            outputs, inputs = block.gate_up.shape
            possible = block.gate_up.can_interleave and not block.down.apart
            block.gate_up.interleave(possible and self._quack.can_gate(self._head, inputs, outputs // 2))

    def _forward(
        self, block: Block, entry: torch.Tensor, delta: torch.Tensor | None, context: Context
    ) -> tuple[Kept, torch.Tensor]:
        """One block; `delta` is what the block before adds to the residual stream, and so is what is returned."""
        if delta is None:
            normed = ops.rms_norm(entry, block.input_norm, self.shape.eps)
        else:
            entry, normed = ops.add_rms_norm(entry, delta, block.input_norm, self.shape.eps)
        made, normed = self._attention(block, entry, normed, context)
        if block.gate_up.interleaved:
            gate_up, inner = self._quack.gated(normed, block.gate_up.weight().t())
            return made._replace(gate_up=gate_up), block.down.forward(inner, context.seed)
        gate_up, gate_up_low = self._gate_up(block, normed, context)
        del normed
        pair, masks = _only(block.down.pairs), block.down.masks(context.seed)
        inner, low = ops.swiglu(gate_up, pair and pair.a, masks, block.gate_up.lift(gate_up_low))
        delta = block.down.forward(inner, context.seed, low)
        return made._replace(gate_up=gate_up, gate_up_low=gate_up_low, low=low), delta

    def _gate_up(
        self, block: Block, normed: torch.Tensor, context: Context
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if block.down.pairs:
            return block.gate_up.forward_gated(normed, context.seed)
        return block.gate_up.forward(normed, context.seed), None

    def _attention(
        self, block: Block, entry: torch.Tensor, normed: torch.Tensor, context: Context
    ) -> tuple[Kept, torch.Tensor]:
        """The first half of a block, and the normed stream that its second half reads."""
        qkv = block.qkv.forward(normed, context.seed)
        q, k, v = self._rotated(block, qkv, context)
        attended = attend(q, k, v, context.pack)
        out = attended.out.flatten(1)
        delta = block.o.forward(out, context.seed)
        middle, normed = ops.add_rms_norm(entry, delta, block.mlp_norm, self.shape.eps)
        return Kept(entry, qkv, out, attended.log_sum, middle), normed

    def _backward(self, block: Block, kept: Kept, grad: torch.Tensor, context: Context, need_input: bool) -> None:
        """One block backwards; `grad`, of the residual stream, is replaced."""
        eps = self.shape.eps
        if kept.qkv is None:
            normed = ops.rms_norm(kept.entry, block.input_norm, eps)
            again, normed = self._attention(block, kept.entry, normed, context)
            gate_up, low = self._gate_up(block, normed, context)
            kept = again._replace(gate_up=gate_up, gate_up_low=low, low=kept.low)
        middle = kept.middle
        assert middle is not None
        if kept.gate_up is None:
            gate_up, low = self._gate_up(block, ops.rms_norm(middle, block.mlp_norm, eps), context)
            kept = kept._replace(gate_up=gate_up, gate_up_low=low)
        gate_up = self._down_backward(block, kept, grad, context.seed)
        self._normed_backward(block.gate_up, gate_up, middle, block.mlp_norm, grad, context.seed)
        kept = kept._replace(gate_up=None, gate_up_low=None, middle=None)
        del gate_up, middle
        qkv_grad = self._attention_backward(block, kept, grad, context)
        if need_input:
            self._normed_backward(block.qkv, qkv_grad, kept.entry, block.input_norm, grad, context.seed)
        else:
            normed = ops.rms_norm(kept.entry, block.input_norm, eps)
            self._beside.run(lambda: block.qkv.adapter_grads(qkv_grad, normed, context.seed, None))

    def _down_backward(self, block: Block, kept: Kept, grad: torch.Tensor, seed: torch.Tensor | None) -> torch.Tensor:
        """The gradient of gate and up, in their place."""
        assert kept.gate_up is not None
        group = block.down
        if block.gate_up.interleaved:
            inner = self._quack.gated_backward(grad, group.weight(), kept.gate_up)
            self._beside.run(lambda: group.adapter_grads_of_wide_input(grad, inner))
            return kept.gate_up
        inner_grad, pair, behind = group.input_grad(grad), _only(group.pairs), None
        if pair is not None and kept.low is not None:
            low_grad = torch.empty_like(kept.low)
            ops.both_sides(grad, pair.b, kept.low, low_grad, pair.grad_b, pair.scale)
            behind = Behind(low_grad, pair.a if group.apart else None, pair.grad_a, group.masks(seed))
        ops.swiglu_backward(inner_grad, kept.gate_up, behind, block.gate_up.lift(kept.gate_up_low))
        return kept.gate_up

    def _normed_backward(
        self,
        group: Group,
        out_grad: torch.Tensor,
        entry: torch.Tensor,
        norm: torch.Tensor,
        grad: torch.Tensor,
        seed: torch.Tensor | None,
    ) -> None:
        """A group that reads a norm of the residual stream: add its part to the stream's gradient."""
        inner = group.input_grad(out_grad)
        if group.apart:
            group.adapter_grads(out_grad, ops.rms_norm(entry, norm, self.shape.eps), seed, inner)
        self._beside.join()  # it reads `grad`
        ops.rms_norm_backward(entry, norm, self.shape.eps, inner, grad)
        if not group.apart:
            self._beside.run(lambda: group.adapter_grads(out_grad, inner, seed, None))

    def _attention_backward(self, block: Block, kept: Kept, grad: torch.Tensor, context: Context) -> torch.Tensor:
        out = kept.out
        assert kept.qkv is not None and out is not None and kept.log_sum is not None
        out_grad = block.o.input_grad(grad)
        if block.o.apart:
            block.o.adapter_grads(grad, out, context.seed, out_grad)
        else:
            self._beside.run(lambda: block.o.adapter_grads(grad, out, context.seed, None))
        raw = None if block.head_norms is None else kept.qkv
        q, k, v = self._split(kept.qkv) if raw is None else self._rotated(block, kept.qkv, context)
        attended = Attended(self._heads(out), kept.log_sum)
        grads = attend_backward(self._heads(out_grad), q, k, v, attended, context.pack)
        return ops.rotate_backward(grads, raw, context.cos, context.sin, block.head_norms, self.shape.eps)

    def _head_loss(self, states: torch.Tensor, pack: Pack) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum of losses, and the gradient of `states`; the head runs in chunks, and only where it predicts."""
        picked = states[pack.predicts]
        chunk = logit_rows(len(self._head), self._head.element_size())
        loss = torch.zeros((), dtype=torch.float32, device=states.device)
        for start in range(0, len(picked), chunk):
            part = picked[start : start + chunk]
            logits = self._quack.product(part, self._head.t())
            loss += self._quack.cross_entropy(logits, pack.targets[start : start + chunk]).sum()
            torch.mm(logits, self._head, out=part)
            del logits  # else those of the next chunk would have to find room beside them
        return loss, torch.zeros_like(states).index_copy_(0, pack.predicts, picked)

    def _rotated(self, block: Block, qkv: torch.Tensor, context: Context) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values as attention reads them; in place where there are no head norms."""
        shape, norms = self.shape, block.head_norms
        out = qkv if norms is None else qkv.new_empty(len(qkv), shape.query_width + shape.kv_width)
        ops.rotate(qkv, out, context.cos, context.sin, norms, shape.eps, shape.query_heads, shape.kv_heads)
        q, k = out[:, : shape.query_width], out[:, shape.query_width : shape.query_width + shape.kv_width]
        return self._heads(q), self._heads(k), self._split(qkv)[2]

    def _split(self, qkv: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, kv = self.shape.query_width, self.shape.kv_width
        return tuple(self._heads(part) for part in qkv.split([q, kv, kv], dim=1))

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        """`[tokens, heads, head_width]`"""
        heads: torch.Tensor = x.unflatten(1, (-1, self.shape.head_width))
        return heads

    def _keep(self, kept: dict[int, Kept], number: int, made: Kept) -> None:
        near = number >= len(self._blocks) - NEAR_THE_END
        if self.activation_memory == "fast":
            kept[number] = made
        elif self.activation_memory == "balanced" or (near and self._host is not None):
            kept[number] = made._replace(gate_up=None, gate_up_low=None)
        elif self._host is None:
            kept[number] = Kept(made.entry, low=made.low)
        else:
            self._host.store(number, made._replace(gate_up=None, gate_up_low=None))

    def _fetch(self, kept: dict[int, Kept], number: int) -> Kept:
        mine = kept.pop(number) if self._host is None or number in kept else self._host.take(number)
        if self._host is not None:
            self._host.prefetch(number - 1)
        return mine


def _only(pairs: list[Pair]) -> Pair | None:
    """The adapter of a group of one linear."""
    return pairs[0] if pairs else None
