"""The engine's kernels and passes on CUDA, against torch in fp32 and against PEFT with bitsandbytes."""

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, Qwen2Config, Qwen3Config

from qlora_core.events import Note
from qlora_core.modeling.loss import collate, token_loss
from qlora_core.training.engine import attention, flash4, ops
from qlora_core.training.engine.beside import Beside
from qlora_core.training.engine.compiled import settle, start, wait, why_not
from qlora_core.training.engine.engine import Engine
from qlora_core.training.engine.graphs import Replayed
from qlora_core.training.engine.operands import Behind
from qlora_core.training.engine.pack import IGNORED, pack_rows
from qlora_core.training.engine.quack import ENOUGH_TOKENS, Quack, form
from qlora_core.training.engine.weights import FourBit, Gptq
from tests.quantized import pack_gptq
from tests.unit.training.engine_models import TARGETS, give_known_dropout, random_rows, randomize, relative_difference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
SHAPE = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
CONFIGS = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}


def compiled_now(kernel, *form: str) -> str | None:
    """Why a kernel cannot be used, once it is known."""
    start(kernel, *form)
    wait()
    settle()
    return why_not(kernel, *form)


def skip_without(kernel, *form: str) -> None:
    """On another GPU, or where the package is not installed; one that is there and does not work is a failure."""
    reason = compiled_now(kernel, *form)
    if reason is not None and ("Hopper GPUs only" in reason or "is not installed" in reason):
        pytest.skip(reason)
    assert reason is None


@pytest.fixture(scope="module", autouse=True)
def newest_kernels():
    """Where they are installed, the engine runs with them from the first pass of a test on."""
    compiled_now("flash4", *flash4.form(SHAPE["num_attention_heads"], SHAPE["num_key_value_heads"], 64, torch.bfloat16))
    compiled_now("quack", *form(torch.bfloat16, SHAPE["hidden_size"], SHAPE["vocab_size"]))


def on_both(function, *tensors: torch.Tensor) -> float:
    """Largest relative difference of what a function returns or replaces, in bf16 on CUDA and fp32 on the CPU."""
    exact = [t.clone() for t in tensors]
    fast = [t.to("cuda", torch.bfloat16) if t.is_floating_point() else t.cuda() for t in tensors]
    results = [function(*exact), function(*fast)]
    made = [list(r) if isinstance(r, tuple) else [] if r is None else [r] for r in results]
    pairs = [*zip(exact, fast, strict=True), *zip(*made, strict=True)]
    return max(relative_difference(b.cpu(), a) for a, b in pairs if a.is_floating_point())


def both_sides(x: torch.Tensor, m: torch.Tensor, u: torch.Tensor, *parts: slice) -> tuple[torch.Tensor, ...]:
    low, grad = torch.empty_like(u), torch.zeros(m.shape, device=m.device)
    ops.both_sides(x, m, u, low, grad, 0.5, parts or (slice(None),))
    return low, grad


def test_kernels_agree_with_torch():
    torch.manual_seed(0)
    h, d, weight, wide = torch.randn(300, 200), torch.randn(300, 200), torch.rand(200) + 0.5, torch.randn(300, 400)
    angle = torch.randn(300, 16)
    cos, sin = torch.cat([angle.cos()] * 2, 1), torch.cat([angle.sin()] * 2, 1)
    qkv, norms = torch.randn(300, 8 * 32), torch.rand(2, 32) + 0.5
    heads = torch.randn(300, 4, 32), torch.randn(300, 2, 32), torch.randn(300, 2, 32)
    cases = {
        "norm": (lambda h, w: ops.rms_norm(h, w, 1e-6), h, weight),
        "add": (lambda h, d, w: ops.add_rms_norm(h, d, w, 1e-6), h, d, weight),
        "norm backward": (lambda h, w, g, r: ops.rms_norm_backward(h, w, 1e-6, g, r), h, weight, d, h),
        "swiglu": (lambda x, a: ops.swiglu(x, a, None, None), wide, torch.randn(16, 200)),
        "swiglu alone": (lambda x: ops.swiglu(x, None, None, None)[0], wide),
        "swiglu backward": (
            lambda g, x, low: (
                lambda grad_a: (ops.swiglu_backward(g, x, Behind(low, None, grad_a, None), None), grad_a)[1]
            )(torch.zeros(16, 200, device=g.device)),
            d, wide, torch.randn(300, 16),
        ),
        "swiglu backward alone": (lambda g, x: ops.swiglu_backward(g, x, None, None), d, wide),
        "both sides": (both_sides, wide, torch.randn(400, 16), torch.randn(300, 16)),
        "both sides of two": (
            lambda *of: both_sides(*of, slice(0, None, 2), slice(1, None, 2)),
            wide, torch.randn(400, 16), torch.randn(300, 32),
        ),
        "both sides of three": (
            lambda *of: both_sides(*of, slice(0, 200), slice(200, 240), slice(280, 400)),
            wide, torch.randn(360, 16), torch.randn(300, 48),
        ),
        "rotate": (lambda x, c, s: ops.rotate(x, x, c, s, None, 1e-6, 4, 2), qkv, cos, sin),
        "rotate normed": (
            lambda x, c, s, n: (lambda out: (ops.rotate(x, out, c, s, (n[0], n[1]), 1e-6, 4, 2), out)[1])(
                x[:, : 6 * 32].clone()
            ),
            qkv, cos, sin, norms,
        ),
        "rotate backward": (
            lambda q, k, v, x, c, s, n: ops.rotate_backward((q, k, v), x, c, s, (n[0], n[1]), 1e-6),
            *heads, qkv, cos, sin, norms,
        ),
        "cross entropy": (ops.cross_entropy, torch.randn(64, 20_000), torch.randint(-1, 20_000, (64,))),
    }  # fmt: skip
    found = {name: on_both(*case) for name, case in cases.items()}
    assert max(found.values()) < 1e-2, found


@pytest.mark.parametrize("rank", [16, 256])
@pytest.mark.parametrize("nested", [True, False])
def test_4bit_weights_are_those_of_bitsandbytes(nested, rank):
    torch.manual_seed(0)
    weight, a, b = torch.randn(300, 704), torch.randn(rank, 704).bfloat16(), torch.randn(300, rank).bfloat16()
    packed, state = quantize_4bit(weight.cuda(), quant_type="nf4", compress_statistics=nested)
    out = torch.full((600, 704), torch.nan, device="cuda", dtype=torch.bfloat16)[::2]
    FourBit(packed, state).fill(out, a.cuda(), b.cuda())
    assert relative_difference(out.cpu(), dequantize_4bit(packed, state).cpu() + b.float() @ a.float()) < 3e-3


@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize("bits", [4, 8])
def test_gptq_weights_are_those_of_torch(bits, group):
    torch.manual_seed(0)
    parts = pack_gptq(torch.randn(288, 768), bits, group)
    a, b = torch.randn(16, 768).bfloat16(), torch.randn(288, 16).bfloat16()
    stored = Gptq(parts["qweight"], parts["scales"], parts["qzeros"], parts["g_idx"], group, bits, zero_offset=1)
    expected, out = torch.empty(288, 768), torch.empty(288, 768, device="cuda", dtype=torch.bfloat16)
    stored.fill(expected, a.float(), b.float())
    there = [part.cuda() if isinstance(part, torch.Tensor) else part for part in stored]
    Gptq(*there).fill(out, a.cuda(), b.cuda())
    assert relative_difference(out.cpu(), expected) < 3e-3


@pytest.fixture(params=CONFIGS)
def folder(request, tmp_path):
    torch.manual_seed(1)
    randomize(AutoModelForCausalLM.from_config(CONFIGS[request.param](**SHAPE))).save_pretrained(tmp_path)
    return tmp_path


def adapted(folder, dtype: torch.dtype, rank: int = 8, dropout: float = 0.0) -> PeftModel:
    """The quantized model with an adapter that is not zero, the same for every dtype."""
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=nf4, dtype=dtype, device_map={"": 0})
    base.requires_grad_(False)
    torch.manual_seed(2)
    lora = LoraConfig(r=rank, lora_alpha=16, lora_dropout=dropout, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = get_peft_model(base, lora)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
        if "lora_B" in name:
            torch.nn.init.normal_(parameter.data, 0, 0.05)
    return model


def gradients(model: PeftModel) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def plain_pass(model: PeftModel, rows) -> tuple[float, torch.Tensor]:
    """Loss and gradients of PEFT with bitsandbytes."""
    mixed = model.get_base_model().dtype == torch.bfloat16
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=mixed):
        loss = token_loss(model.get_base_model(), collate(rows, 0).to(torch.device("cuda"))).loss_sum
    loss.backward()
    return loss.item(), gradients(model)


@pytest.fixture(scope="module", params=[(512, 512), (3584, 152_064)], ids=["few inputs", "7B"])
def sizes(request):
    """Hidden size and vocabulary, of models on both sides of what is few inputs."""
    return request.param


@pytest.fixture(scope="module")
def kernels(sizes):
    skip_without("quack", *form(torch.bfloat16, *sizes))
    return Quack(torch.bfloat16, *sizes)


@pytest.mark.parametrize("row_major", [True, False])
def test_wide_products_are_those_of_torch(kernels, row_major):
    torch.manual_seed(0)
    x = torch.randn(ENOUGH_TOKENS + 76, 256).bfloat16()
    weight = torch.randn(256, 1000).bfloat16() if row_major else torch.randn(1000, 256).bfloat16().t()
    assert relative_difference(kernels.product(x.cuda(), weight.cuda()).cpu(), x.float() @ weight.float()) < 3e-3


def test_losses_and_their_gradients_are_those_of_torch(kernels, sizes):
    torch.manual_seed(0)
    for vocabulary in (sizes[1], 1001):
        logits = torch.randn(65, vocabulary).bfloat16()
        targets = torch.randint(0, vocabulary, (65,))
        targets[::7] = IGNORED
        exact, fast = logits.float(), logits.cuda()
        expected, losses = ops.cross_entropy(exact, targets), kernels.cross_entropy(fast, targets.cuda())
        assert relative_difference(losses.cpu(), expected) < 1e-4
        assert relative_difference(fast.cpu(), exact) < 5e-3
        assert not fast[::7].any()
        assert not losses[::7].any()


def test_gated_products_are_those_of_torch(kernels):
    torch.manual_seed(0)
    x, grad = torch.randn(300, 256).bfloat16(), torch.randn(300, 200).bfloat16()
    weight, behind = torch.randn(256, 1008).bfloat16() / 16, torch.randn(200, 504).bfloat16() / 16
    gate_up, inner = kernels.gated(x.cuda(), weight.cuda())
    both = x.float() @ weight.float()
    assert relative_difference(gate_up.cpu(), both) < 3e-3
    both = gate_up.cpu().float()
    whole = torch.cat([both[:, ::2], both[:, 1::2]], dim=1)
    expected = ops.swiglu(whole, None, None, None)[0]
    assert relative_difference(inner.cpu(), expected) < 5e-3
    again = kernels.gated_backward(grad.cuda(), behind.cuda(), gate_up)
    ops.swiglu_backward(grad.float() @ behind.float(), whole, None, None)
    assert relative_difference(again.cpu(), expected) < 5e-3
    assert relative_difference(gate_up.cpu(), torch.stack(whole.chunk(2, dim=1), dim=2).flatten(1)) < 5e-3


@pytest.mark.parametrize("lengths", [(700, 3, 130, 1), (256, 256)])
@pytest.mark.parametrize("head_width", [64, 128])
@pytest.mark.parametrize("newest", [True, False])
def test_attention_sees_its_own_row_alone(monkeypatch, lengths, head_width, newest):
    heads, kv_heads = 6, 2
    torch.manual_seed(0)
    pack = pack_rows(random_rows(SHAPE["vocab_size"], lengths), fill_up=True)
    if not newest:
        monkeypatch.setattr(attention, "why_not", lambda *kernel: "not wanted")
    else:
        skip_without("flash4", *flash4.form(heads, kv_heads, head_width, torch.bfloat16))
    qkv = torch.randn(len(pack.input_ids), heads + 2 * kv_heads, head_width).bfloat16()
    grad = torch.randn(len(qkv), heads, head_width).bfloat16()

    def passes(device: str, dtype: torch.dtype) -> list[torch.Tensor]:
        q, k, v = qkv.to(device, dtype).split([heads, kv_heads, kv_heads], dim=1)
        there = pack.to(torch.device(device))
        made = attention.attend(q, k, v, there)
        return [made.out, *attention.attend_backward(grad.to(device, dtype), q, k, v, made, there)]

    for ours, exact in zip(passes("cuda", torch.bfloat16), passes("cpu", torch.float32), strict=True):
        assert relative_difference(ours.cpu(), exact) < 5e-3


@pytest.mark.parametrize("lengths", [(40, 90, 7, 130), (64, 64, 64, 64)])
@pytest.mark.parametrize("memory", ["fast", "balanced", "small"])
def test_loss_and_gradients_are_those_of_peft(folder, memory, lengths):
    rows = random_rows(SHAPE["vocab_size"], lengths)
    exact_loss, exact = plain_pass(adapted(folder, torch.float32), rows)
    model = adapted(folder, torch.bfloat16)
    _, plain = plain_pass(model, rows)
    notes: list[str] = []
    engine = Engine(model, torch.bfloat16, memory)
    run = Replayed(engine, lambda event: notes.append(event.message) if isinstance(event, Note) else None)
    pack, seed = pack_rows(rows, fill_up=True).to(torch.device("cuda")), torch.zeros(1, dtype=torch.int64).cuda()
    for _ in range(3):  # as it is, recorded, replayed
        engine.adapter.grads.zero_()
        loss = run.loss_and_grads(pack, seed).item()
        ours = gradients(model)
        assert loss == pytest.approx(exact_loss, rel=1e-3)
        assert relative_difference(ours, plain) < 2e-2
        assert relative_difference(ours, exact) < 1.1 * relative_difference(plain, exact)
    assert not notes


def test_gradients_made_beside_a_pass_are_those_made_in_it(tmp_path, monkeypatch):
    wide = SHAPE | {"hidden_size": 1024, "intermediate_size": 4096, "head_dim": 64, "max_position_embeddings": 2048}
    compiled_now("quack", *form(torch.bfloat16, wide["hidden_size"], wide["vocab_size"]))
    torch.manual_seed(1)
    randomize(AutoModelForCausalLM.from_config(LlamaConfig(**wide))).save_pretrained(tmp_path)
    model = adapted(tmp_path, torch.bfloat16)
    pack = pack_rows(random_rows(SHAPE["vocab_size"], [2048] * 4), fill_up=False).to(torch.device("cuda"))
    seed = torch.zeros(1, dtype=torch.int64).cuda()
    engine = Engine(model, torch.bfloat16)

    def passes() -> list[torch.Tensor]:
        run, made = Replayed(engine, lambda event: None), []
        for _ in range(6):
            engine.adapter.grads.zero_()
            run.loss_and_grads(pack, seed)
            made.append(gradients(model).clone())
        return made

    beside = passes()
    monkeypatch.setattr(Beside, "run", lambda self, work: work())
    within = passes()[-1]
    assert max(relative_difference(each, within) for each in beside) < 2e-2


@pytest.mark.parametrize("memory", ["fast", "small"])
@pytest.mark.parametrize("passes_before", [0, 1], ids=["as it is", "recorded"])
def test_a_pass_that_ran_out_of_memory_leaves_nothing_behind(folder, memory, passes_before, monkeypatch):
    rows, seed = random_rows(SHAPE["vocab_size"], (64, 64)), torch.zeros(1, dtype=torch.int64).cuda()
    model = adapted(folder, torch.bfloat16)
    pack = pack_rows(rows, fill_up=True).to(torch.device("cuda"))
    engine = Engine(model, torch.bfloat16, memory)
    engine.loss_and_grads(pack, seed)
    expected = gradients(model).clone()
    calls, rotate_backward = [], ops.rotate_backward

    def sometimes(*args):
        calls.append(args)
        if len(calls) == SHAPE["num_hidden_layers"] * passes_before + 2:
            raise torch.OutOfMemoryError
        return rotate_backward(*args)

    monkeypatch.setattr(ops, "rotate_backward", sometimes)
    run = Replayed(engine, lambda event: None)
    with pytest.raises(torch.OutOfMemoryError):
        run.loss_and_grads(pack, seed)
    for _ in range(3):
        engine.adapter.grads.zero_()
        run.loss_and_grads(pack, seed)
        assert relative_difference(gradients(model), expected) < 1e-2


@pytest.mark.parametrize("rank", [8, 64])
def test_dropout_is_that_of_peft_with_the_same_masks(folder, rank):
    rows, seed = random_rows(SHAPE["vocab_size"], (130,)), torch.tensor([5]).cuda()
    model = adapted(folder, torch.bfloat16, rank, dropout=0.3)
    engine = Engine(model, torch.bfloat16)
    run = Replayed(engine, lambda event: None)
    pack = pack_rows(rows, fill_up=False).to(torch.device("cuda"))  # a mask's places are those of the row itself
    for attempt in range(2):  # as it is, replayed with another seed than it was recorded with
        loss = run.loss_and_grads(pack, seed - 1 + attempt).item()
        ours = gradients(model).clone()
        engine.adapter.grads.zero_()
    exact, plain = (adapted(folder, dtype, rank, dropout=0.3) for dtype in (torch.float32, torch.bfloat16))
    for reference in (exact, plain):
        give_known_dropout(reference, 0.3, seed)
        reference.train()
    (exact_loss, exact_grads), (_, plain_grads) = plain_pass(exact, rows), plain_pass(plain, rows)
    assert loss == pytest.approx(exact_loss, rel=1e-3)
    assert relative_difference(ours, exact_grads) < 1.1 * relative_difference(plain_grads, exact_grads)
