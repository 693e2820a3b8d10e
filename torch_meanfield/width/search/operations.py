"""Which torch functions the labels can follow, by what they do to them.

Names are those of :func:`torch_meanfield.observe.observer.plain_name`; the in-place variant of each is included.
"""

from __future__ import annotations

# Element by element, of one tensor: the result has its labels.
UNARY = frozenset(
    "abs alpha_dropout bfloat16 bitwise_not ceil celu clamp_max clamp_min clip clone contiguous cos cpu cuda data "
    "detach double dropout dropout1d dropout2d dropout3d elu erf exp expm1 feature_alpha_dropout feature_dropout "
    "float floor gelu get_data get_grad get_real half hardshrink hardsigmoid hardswish hardtanh invert isfinite "
    "isnan leaky_relu log log1p log2 logical_not logit logsigmoid mish nan_to_num neg negative positive "
    "quick_gelu reciprocal relu relu6 requires_grad round rrelu rsqrt selu sigmoid sign silu sin softplus "
    "softsign sqrt square tan tanh tanhshrink threshold to to_dense type type_as zeros_like".split()
)
# Element by element, of several tensors: their labels meet.
NARY = frozenset(
    "_weight_norm add addcdiv addcmul atan2 bitwise_and bitwise_or clamp copysign div divide eq floor_divide "
    "fmax fmin fmod ge gt hypot le lerp logaddexp logical_and logical_or lt masked_fill maximum minimum mod mul "
    "multiply ne pow rdiv remainder rsub sub subtract true_divide where".split()
)
# Those of them that join a residual branch to its stream.
ADDITIONS = frozenset(("add", "sub", "rsub", "subtract", "lerp", "addcmul", "addcdiv"))
# Entries are moved, copied or left out: the same is done to the labels.
SHAPE = frozenset(
    "adjoint as_strided broadcast_to channel_shuffle chunk diagonal expand expand_as flatten flip gather get_H "
    "get_T get_mT getitem hsplit index_select iter moveaxis movedim narrow pad permute pixel_shuffle "
    "pixel_unshuffle ravel repeat repeat_interleave reshape reshape_as roll rot90 select split split_with_sizes "
    "squeeze swapaxes swapdims t take_along_dim tensor_split tile transpose tril triu unbind unflatten unfold "
    "unsqueeze view view_as vsplit".split()
)
# Pooling and resizing of every channel by itself.
SPATIAL = frozenset(
    "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d "
    "adaptive_max_pool2d_with_indices avg_pool1d avg_pool2d avg_pool3d grid_sample interpolate lp_pool2d "
    "max_pool1d max_pool1d_with_indices max_pool2d max_pool2d_with_indices max_pool3d upsample upsample_bilinear "
    "upsample_nearest".split()
)
CHANNEL_NORMS = frozenset(("batch_norm", "instance_norm"))
LAST_NORMS = frozenset(("layer_norm", "rms_norm"))
# Normalisation along one dimension, and the position of the argument that names it.
SOFT = {"softmax": 1, "log_softmax": 1, "softmin": 1, "normalize": 2, "cumsum": 1}
# Reductions, and the position of the argument ``dim``.
REDUCE = {
    **dict.fromkeys(
        "sum mean amax amin max min prod any all argmax argmin logsumexp var std var_mean std_mean median "
        "count_nonzero nansum nanmean".split(),
        1,
    ),
    **dict.fromkeys(("norm", "vector_norm", "linalg_vector_norm"), 2),
}
