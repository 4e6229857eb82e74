"""Whether every adapted weight is the base's plus what PEFT itself says the adapter adds, rounded once."""

from collections.abc import Mapping

from peft import PeftModel
from peft.tuners.lora import LoraLayer

from qlora_core.errors import MergeError
from qlora_core.merging.blocks import Scratch, opened
from qlora_core.merging.tensors import StoredTensor

ADAPTER = "default"
ROUNDING = 1e-6
"""What fp32 sums of two orders may differ by, absolute."""

MAX_SHARE = 1e-3
"""Of elements that may round to the other neighbour: fp32 sums differ in their last bit between the two ways."""


def check_deltas(adapted: PeftModel, base: Mapping[str, StoredTensor], merged: Mapping[str, StoredTensor]) -> None:
    """Compare every weight that carries plain LoRA with PEFT's own product; DoRA is left to the predictions.

    An adapter added at the wrong scale or rounded twice is seen here even where it hides below the limits on logits.

    Raises:
        MergeError: a weight is something else.
    """
    scratch = Scratch()
    with opened({tensor.file for tensor in (*base.values(), *merged.values())}) as files:
        for module_name, module in adapted.get_base_model().named_modules():
            name = f"{module_name}.weight"
            if not isinstance(module, LoraLayer) or name not in merged or ADAPTER in module.lora_variant:
                continue
            before, after = (
                files.read(tensors[name], 0, tensors[name].rows, scratch, role)
                for role, tensors in (("before", base), ("after", merged))
            )
            exact = before.float() + module.get_delta_weight(ADAPTER).detach().float().cpu()
            expected = exact.to(after.dtype)
            off = (after.float() - expected.float()).abs_() > ROUNDING
            share = int(off.count_nonzero()) / max(1, off.numel())
            if share > MAX_SHARE:
                raise MergeError(
                    f"proof of the merge: {share:.2%} of {name} is not the base plus what PEFT adds, rounded once "
                    f"(at most {MAX_SHARE:.2%}); this is a defect of the merge, please report it"
                )
