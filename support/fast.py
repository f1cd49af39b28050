"""The one place where a model is given its fast forms."""

from moe import GPT, Experts
from support import head, kernels


def speed_up(model: GPT) -> GPT:
    """Give `model` fast experts and a fast head, in place, and return it. Values and gradients are those of moe.py's
    plain forms up to rounding (tests/test_kernels.py).

    They belong to this model: a deepcopy keeps them, and a model made from it (`upcycle`, `load_model`) is plain again.
    """
    for module in model.modules():
        if isinstance(module, Experts):
            module.kernel = kernels.mix_experts
    model.lm_loss_kernel, model.log_probs_kernel = head.lm_loss, head.token_log_probs
    return model
