"""What torch functions do to a factor: ``f(s * x) = s * f(x)`` or not. Names as :mod:`.trace` records them."""

from __future__ import annotations

# The same numbers in another arrangement; the result stands for the first argument.
SAME = frozenset(
    "view reshape permute transpose flatten unflatten contiguous clone squeeze unsqueeze to type_as float double half "
    "bfloat16 movedim moveaxis swapaxes swapdims t get_T get_mT get_H get_data detach view_as dropout dropout1d "
    "dropout2d dropout3d alpha_dropout feature_dropout requires_grad as_tensor adjoint reshape_as positive".split()
)

# Parts or rearrangements of the numbers.
PARTS = frozenset(
    "getitem narrow select index_select chunk split split_with_sizes tensor_split unbind unfold roll flip expand "
    "expand_as repeat repeat_interleave tile pixel_shuffle pixel_unshuffle channel_shuffle fold as_strided gather "
    "diagonal rot90 take_along_dim broadcast_to masked_select unsafe_chunk unsafe_split hsplit vsplit dsplit".split()
)

# Linear in the first argument, without an offset.
LINEAR = (
    SAME
    | PARTS
    | frozenset(
        "mean sum neg negative avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d "
        "adaptive_avg_pool3d interpolate upsample pad cumsum fft fft2 fftn rfft rfft2 rfftn ifft ifft2 ifftn irfft "
        "irfft2 irfftn fft_fft2 fft_rfft2 fft_irfft2 fft_ifft2 fft_fft fft_ifft fft_rfft fft_irfft fft_fftshift "
        "fft_ifftshift view_as_complex view_as_real real get_real get_imag imag nanmean tril triu".split()
    )
)

# Of these the second argument lends its shape or dtype, not its numbers.
LIKE = frozenset("expand_as view_as reshape_as type_as to".split())

# f(s * x) = s * f(x) for s >= 0 only.
POSITIVE = frozenset(
    "relu leaky_relu prelu rrelu abs max_pool1d max_pool2d max_pool3d adaptive_max_pool1d adaptive_max_pool2d "
    "max_pool2d_with_indices amax amin max min boolean_dispatch fractional_max_pool2d".split()
)

JOIN = frozenset("cat concat concatenate stack hstack vstack dstack".split())
PLUS = frozenset(("add", "sub", "subtract"))
TIMES = frozenset("mul multiply matmul mm bmm dot outer mv einsum".split())
OVER = frozenset("div divide true_divide".split())

# position and name of (input, weight, bias)
LAYERS: dict[str, tuple[tuple[int, str], ...]] = {
    **dict.fromkeys(("linear", "conv1d", "conv2d", "conv3d"), ((0, "input"), (1, "weight"), (2, "bias"))),
    **{f"conv_transpose{d}d": ((0, "input"), (1, "weight"), (2, "bias")) for d in (1, 2, 3)},
    "addmm": ((1, "mat1"), (2, "mat2"), (0, "input")),
    "baddbmm": ((1, "batch1"), (2, "batch2"), (0, "input")),
}
NORMS: dict[str, tuple[tuple[int, str], ...]] = {
    "batch_norm": ((0, "input"), (3, "weight"), (4, "bias")),
    "instance_norm": ((0, "input"), (3, "weight"), (4, "bias")),
    "layer_norm": ((0, "input"), (2, "weight"), (3, "bias")),
    "group_norm": ((0, "input"), (2, "weight"), (3, "bias")),
    "rms_norm": ((0, "input"), (2, "weight")),
}
ATTENTION = frozenset(("scaled_dot_product_attention",))
MULTIHEAD = "multi_head_attention_forward"

# May stand on the residual stream behind an addition: post-activation networks.
ACTIVATIONS = frozenset(
    "relu leaky_relu prelu rrelu relu6 gelu silu mish hardswish elu selu celu hardtanh softplus tanh sigmoid "
    "hardsigmoid softsign clamp clip".split()
)
