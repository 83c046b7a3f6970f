"""What is computed: one operator a file, each with its schema, its plain-PyTorch reference and its checks."""

from sparse_gen.ops import (
    block_halo,
    block_sparse_conv2d,
    concrete_mask,
    conv_norm,
    dispatch,
    extension,
    masked_adam,
    masked_conv2d,
    norm_act,
    norm_head,
    norm_load,
    philox,
    pooled_means,
    sparse_conv2d,
    sparse_upsample_conv2d,
    squared_errors,
)

__all__ = [
    "block_halo",
    "block_sparse_conv2d",
    "concrete_mask",
    "conv_norm",
    "dispatch",
    "extension",
    "masked_adam",
    "masked_conv2d",
    "norm_act",
    "norm_head",
    "norm_load",
    "philox",
    "pooled_means",
    "sparse_conv2d",
    "sparse_upsample_conv2d",
    "squared_errors",
]
