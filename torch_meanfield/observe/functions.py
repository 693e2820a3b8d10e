"""What torch functions do to their tensors, in one table by the names under which :class:`Call` reports them.

The conversion of residual branches follows a positive factor s through a function f of its first argument:
``same`` numbers in another arrangement, ``parts`` of them, ``linear`` without an offset, or ``positive``, where
f(s x) = s f(x) for s >= 0 alone. The search for populations follows the labels of units: element by element through a
``unary`` function (an ``activation`` may also stand on the residual stream) or one of several tensors (``nary``),
moved as the entries are (``shape``), channel by channel (``spatial``), or through a reduction (``reduce``).
The in-place variants are included.
"""

from __future__ import annotations

_TABLE = (  # what it is to the conversion, what it is to the search, names
    ("same", "unary", """alpha_dropout bfloat16 clone contiguous detach double dropout dropout1d dropout2d dropout3d
        feature_dropout float get_data half positive requires_grad to type_as"""),
    ("same", "shape", """adjoint flatten get_H get_T get_mT moveaxis movedim permute reshape reshape_as squeeze
        swapaxes swapdims t transpose unflatten unsqueeze view view_as"""),
    ("same", "", "as_tensor"),
    ("parts", "shape", """as_strided broadcast_to channel_shuffle chunk diagonal expand expand_as flip gather getitem
        hsplit index_select narrow pixel_shuffle pixel_unshuffle repeat repeat_interleave roll rot90 select split
        split_with_sizes take_along_dim tensor_split tile unbind unfold vsplit"""),
    ("parts", "", "dsplit fold masked_select unsafe_chunk unsafe_split"),
    ("linear", "unary", "get_real neg negative"),
    ("linear", "shape", "pad tril triu"),
    ("linear", "spatial", """adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d avg_pool1d avg_pool2d
        avg_pool3d interpolate upsample"""),
    ("linear", "reduce", "mean nanmean sum"),
    ("linear", "", """cumsum fft fft2 fft_fft fft_fft2 fft_fftshift fft_ifft fft_ifft2 fft_ifftshift fft_irfft
        fft_irfft2 fft_rfft fft_rfft2 fftn get_imag ifft ifft2 ifftn imag irfft irfft2 irfftn real rfft rfft2 rfftn
        view_as_complex view_as_real"""),
    ("positive", "unary", "abs"),
    ("positive", "activation", "leaky_relu relu rrelu"),
    ("positive", "spatial", """adaptive_max_pool1d adaptive_max_pool2d max_pool1d max_pool2d max_pool2d_with_indices
        max_pool3d"""),
    ("positive", "reduce", "amax amin max min"),
    ("positive", "", "boolean_dispatch fractional_max_pool2d prelu"),
    ("plus", "nary", "add sub subtract"),
    ("times", "nary", "mul multiply"),
    ("times", "", "bmm dot einsum matmul mm mv outer"),
    ("over", "nary", "div divide true_divide"),
    ("join", "", "cat concat concatenate dstack hstack stack vstack"),
    ("", "unary", """bitwise_not ceil clamp_max clamp_min cos cpu cuda data erf exp expm1 feature_alpha_dropout floor
        get_grad hardshrink invert isfinite isnan log log1p log2 logical_not logit logsigmoid nan_to_num quick_gelu
        reciprocal round rsqrt sign sin sqrt square tan tanhshrink threshold to_dense type zeros_like"""),
    ("", "activation", """celu clip elu gelu hardsigmoid hardswish hardtanh mish relu6 selu sigmoid silu softplus
        softsign tanh"""),
    ("", "nary", """_weight_norm addcdiv addcmul atan2 bitwise_and bitwise_or clamp copysign eq floor_divide fmax fmin
        fmod ge gt hypot le lerp logaddexp logical_and logical_or lt masked_fill maximum minimum mod ne pow rdiv
        remainder rsub where"""),
    ("", "shape", "iter ravel"),
    ("", "spatial", """adaptive_max_pool2d_with_indices grid_sample lp_pool2d max_pool1d_with_indices
        upsample_bilinear upsample_nearest"""),
    ("", "reduce", """all any argmax argmin count_nonzero linalg_vector_norm logsumexp median nansum norm prod std
        std_mean var var_mean vector_norm"""),
)  # fmt: skip


def _names(kind: str) -> frozenset[str]:
    return frozenset(name for *kinds, names in _TABLE for name in names.split() if kind in kinds)


SAME, PARTS, POSITIVE = _names("same"), _names("parts"), _names("positive")
LINEAR = SAME | PARTS | _names("linear")
PLUS, TIMES, OVER, JOIN = _names("plus"), _names("times"), _names("over"), _names("join")
LIKE = frozenset("expand_as view_as reshape_as type_as to".split())  # the second argument lends shape or dtype alone
ACTIVATIONS = _names("activation") | {"clamp", "prelu"}
ADDITIONS = PLUS | {"rsub", "lerp", "addcmul", "addcdiv"}  # what may join a residual branch to its stream

UNARY, NARY, SHAPE = _names("unary") | _names("activation"), _names("nary"), _names("shape")
SPATIAL = _names("spatial")
# The position of the argument that names the dimension(s): of reductions, and of normalisation along one dimension.
REDUCE = dict.fromkeys(_names("reduce"), 1) | dict.fromkeys(("norm", "vector_norm", "linalg_vector_norm"), 2)
SOFT = {"softmax": 1, "log_softmax": 1, "softmin": 1, "normalize": 2, "cumsum": 1}

CONVOLUTIONS = tuple(f"conv{kind}{d}d" for kind in ("", "_transpose") for d in (1, 2, 3))
# Position and name of input, weight and bias.
LAYERS: dict[str, tuple[tuple[int, str], ...]] = {
    **dict.fromkeys(("linear", *CONVOLUTIONS), ((0, "input"), (1, "weight"), (2, "bias"))),
    "addmm": ((1, "mat1"), (2, "mat2"), (0, "input")),
    "baddbmm": ((1, "batch1"), (2, "batch2"), (0, "input")),
}
CHANNEL_NORMS, LAST_NORMS = frozenset(("batch_norm", "instance_norm")), frozenset(("layer_norm", "rms_norm"))
NORMS: dict[str, tuple[tuple[int, str], ...]] = {
    **dict.fromkeys(CHANNEL_NORMS, ((0, "input"), (3, "weight"), (4, "bias"))),
    **dict.fromkeys(("layer_norm", "group_norm"), ((0, "input"), (2, "weight"), (3, "bias"))),
    "rms_norm": ((0, "input"), (2, "weight")),
}
ATTENTION = frozenset(("scaled_dot_product_attention",))
MULTIHEAD = "multi_head_attention_forward"
