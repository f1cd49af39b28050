"""Fast experts: `moe.mix_experts` with gathers instead of scatters and one grouped matrix product for all experts.

`support.fast.speed_up` switches them on. E experts, N tokens, K experts a token, S = N * K token slots, D and H widths.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# On a CPU, experts that have this many slots on average are fastest one after the other: an expert's hidden layer
# [slots, H] then stays in the cache until it is used. With fewer, the grouped product saves more by being one call.
SLOTS_FOR_TURNS = 128


def mix_experts(x: Tensor, experts: Tensor, weights: Tensor, w_in, b_in, w_out, b_out) -> Tensor:
    """ERL eq. 1, arguments and result of `moe.mix_experts`. Without a host read where there is a grouped product."""
    if torch.is_autocast_enabled(x.device.type):  # autocast does not know the grouped product
        dtype = torch.get_autocast_dtype(x.device.type)
        x, w_in, b_in, w_out, b_out = (t.to(dtype) for t in (x, w_in, b_in, w_out, b_out))
    N, K = experts.shape
    expert_ids, order = experts.reshape(-1).sort(stable=True)  # [S], [S]: slot s is token order[s] // K
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(N * K, device=x.device))
    every = torch.arange(len(w_in), device=x.device)
    ends = torch.searchsorted(expert_ids, every, right=True, out_int32=True)  # [E], on the device: no host read
    slots = _Rearrange.apply(x, order, inverse, K)  # [S, D]
    slots = expert_networks(slots, w_in, b_in, w_out, b_out, expert_ids, ends)  # [S, D]
    slots = _Rearrange.apply(slots, inverse, order, 1).view(N, K, -1)
    return (slots * weights[..., None]).sum(1).to(slots.dtype)  # float32 weights, see the plain form


class _Rearrange(torch.autograd.Function):
    """x[order // copies], whose gradient is a gather too: index_add would be slow, and not deterministic on CUDA."""

    @staticmethod
    def forward(ctx, x, order, inverse, copies):
        ctx.save_for_backward(inverse)
        ctx.copies = copies
        return x.index_select(0, order // copies if copies > 1 else order)  # x[order] takes 8 times as long on a CPU

    @staticmethod
    def backward(ctx, grad):
        (inverse,) = ctx.saved_tensors
        grad = grad.index_select(0, inverse)
        return (grad.view(-1, ctx.copies, grad.shape[-1]).sum(1) if ctx.copies > 1 else grad), None, None, None


def has_grouped_mm(x: Tensor, weight: Tensor) -> bool:
    """Whether F.grouped_mm takes them: aligned rows, in float32 or bfloat16 on CPU, bfloat16 on CUDA (since Ampere)."""
    if not hasattr(F, "grouped_mm") or any(n * x.element_size() % 16 for n in weight.shape[1:]):
        return False
    if x.device.type == "cuda":
        return x.dtype == torch.bfloat16 and torch.cuda.get_device_capability(x.device) >= (8, 0)
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16)


def turns_are_faster(slots: Tensor, n_expert: int) -> bool:
    """Whether the experts had better work one after the other: on a CPU, in float32, with many slots each."""
    return slots.device.type == "cpu" and slots.dtype == torch.float32 and len(slots) // SLOTS_FOR_TURNS >= n_expert


def expert_networks(x, w_in, b_in, w_out, b_out, expert_ids, ends) -> Tensor:
    """gelu(x_s @ w_in[e_s] + b_in[e_s]) @ w_out[e_s] + b_out[e_s] for token slots sorted by expert.

    x [S, D], w_in [E, D, H], b_in [E, H], w_out [E, H, D], b_out [E, D], expert_ids [S] ascending, ends int32 [E]:
    where each expert's slots end -> [S, D].
    """
    if turns_are_faster(x, len(w_in)) or not (has_grouped_mm(x, w_in) and has_grouped_mm(x, w_out)):
        return _experts_in_turn(x, w_in, b_in, w_out, b_out, ends)
    hidden = F.gelu(_grouped_linear(x, w_in, b_in, expert_ids, ends), approximate="tanh")  # [S, H]
    return _grouped_linear(hidden, w_out, b_out, expert_ids, ends)


@torch.compiler.disable  # it reads `ends` on the host
def _experts_in_turn(x, w_in, b_in, w_out, b_out, ends) -> Tensor:
    """One expert after the other, as the plain form does it: also where there is no grouped product (float64, MPS)."""
    return _InTurn.apply(x, w_in, b_in, w_out, b_out, ends.diff(prepend=ends.new_zeros(1)).tolist())


class _InTurn(torch.autograd.Function):
    """gelu(x_e @ w_in[e] + b_in[e]) @ w_out[e] + b_out[e] for the rows x_e of each expert, of `counts` rows.

    Every result goes where it belongs. Autograd would gather outputs and gradients, those of all weights among them,
    in a copy: 2 % of a small model's step.
    """

    @staticmethod
    def forward(ctx, x, w_in, b_in, w_out, b_out, counts):
        out, saved = x.new_empty(len(x), w_out.shape[2]), []
        for e, (rows, y) in enumerate(zip(x.split(counts), out.split(counts), strict=True)):
            hidden = torch.addmm(b_in[e], rows, w_in[e])  # [n, H]
            active = F.gelu(hidden, approximate="tanh")
            torch.addmm(b_out[e], active, w_out[e], out=y)
            saved += [hidden, active]
        ctx.save_for_backward(x, w_in, w_out, *saved)
        ctx.counts = counts
        return out

    @staticmethod
    def backward(ctx, grad):
        x, w_in, w_out, *saved = ctx.saved_tensors
        grad_x, grads = torch.empty_like(x), [torch.empty_like(w_in), w_in.new_empty(len(w_in), w_in.shape[2])]
        grads += [torch.empty_like(w_out), w_out.new_empty(len(w_out), w_out.shape[2])]
        parts = zip(*(t.split(ctx.counts) for t in (x, grad, grad_x)), saved[::2], saved[1::2], *grads, strict=True)
        for e, (rows, g, g_x, hidden, active, g_w_in, g_b_in, g_w_out, g_b_out) in enumerate(parts):
            torch.mm(active.T, g, out=g_w_out)
            torch.sum(g, 0, out=g_b_out)
            g_hidden = torch.ops.aten.gelu_backward(g @ w_out[e].T, hidden, approximate="tanh")  # [n, H]
            torch.mm(rows.T, g_hidden, out=g_w_in)
            torch.sum(g_hidden, 0, out=g_b_in)
            torch.mm(g_hidden, w_in[e].T, out=g_x)
        return grad_x, *grads, None


def _grouped_linear(x: Tensor, weight: Tensor, bias: Tensor, expert_ids: Tensor, ends: Tensor) -> Tensor:
    if x.dtype == torch.bfloat16:
        # A product adds up the bias' gradient in float32 and always in the same order; that of an embedding does
        # neither (bfloat16 sums on the CPU, atomic additions in compiled CUDA code).
        one_hot = F.one_hot(expert_ids, len(bias)).to(x.dtype)
        return torch.addmm(F.grouped_mm(x, weight, offs=ends), one_hot, bias)
    return _uncompiled_grouped_mm(x, weight, ends).add_(F.embedding(expert_ids, bias))


@torch.compiler.disable  # it knows the grouped product in bfloat16 only
def _uncompiled_grouped_mm(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return F.grouped_mm(x, weight, offs=ends)
