"""The reviewed list of operators a model's graph may use: data, never code.

One line for each aten overload: its arguments with their types, then what it returns, then its traits. The line is our
own statement of what is allowed; a test compares every line with torch's schema. Nothing on the list reads files, runs
code, changes global state (but for torch's random numbers), returns uninitialised memory, resizes a storage, gives
sparse or complex tensors, or has an output shape that depends on values. A change to this list that refuses what was
accepted, or accepts more, is a new OPSET_VERSION.

Never imports torch: publisher, aggregator and device read the same text.

Argument types:
  T       tensor                          T[]  list of tensors             T?[]  list of tensors or None
  N       tensor or number                S    number or bool              f     number, f[] scale factors
  i, i[]  whole number(s)                 b, b[]  bool                     dtype, memory, layout  enums
  n, n[]  a size or a list of sizes: each bounded, and their product too
  p, p[]  positive and bounded (strides, kernels, groups)
  a|b     one of these strings            equation  einsum's letters
A `?` after the type allows None; a `=` says the argument may be left out; arguments after `*` go by keyword.
A type with [] written for one argument takes a list only. Whole numbers may be results of other rows.

Traits: `inplace` changes its first argument; `view` may share memory with its tensor arguments; `random` draws random
numbers; `stats` updates the buffers running_mean and running_var when its first flag says so.
"""

from dataclasses import dataclass
from typing import Final

OPSET_VERSION: Final = 1

_TABLE: Final = """
# matrix products and layers
aten.linear.default (input:T weight:T bias:T?=) -> T
aten.bilinear.default (input1:T input2:T weight:T bias:T?=) -> T
aten.matmul.default (self:T other:T) -> T
aten.mm.default (self:T mat2:T) -> T
aten.bmm.default (self:T mat2:T) -> T
aten.mv.default (self:T vec:T) -> T
aten.dot.default (self:T tensor:T) -> T
aten.addmm.default (self:T mat1:T mat2:T * beta:S= alpha:S=) -> T
aten.addmv.default (self:T mat:T vec:T * beta:S= alpha:S=) -> T
aten.baddbmm.default (self:T batch1:T batch2:T * beta:S= alpha:S=) -> T
aten.outer.default (self:T vec2:T) -> T
aten.einsum.default (equation:equation tensors:T[]) -> T [view]
aten.conv1d.default (input:T weight:T bias:T?= stride:p[]= padding:n[]= dilation:p[]= groups:p=) -> T
aten.conv1d.padding (input:T weight:T bias:T?= stride:p[]= padding:same|valid= dilation:p[]= groups:p=) -> T
aten.conv2d.default (input:T weight:T bias:T?= stride:p[]= padding:n[]= dilation:p[]= groups:p=) -> T
aten.conv2d.padding (input:T weight:T bias:T?= stride:p[]= padding:same|valid= dilation:p[]= groups:p=) -> T
aten.conv3d.default (input:T weight:T bias:T?= stride:p[]= padding:n[]= dilation:p[]= groups:p=) -> T
aten.conv3d.padding (input:T weight:T bias:T?= stride:p[]= padding:same|valid= dilation:p[]= groups:p=) -> T
aten.conv_transpose1d.default (input:T weight:T bias:T?= stride:p[]= padding:n[]= output_padding:n[]= groups:p= dilation:p[]=) -> T
aten.conv_transpose2d.input (input:T weight:T bias:T?= stride:p[]= padding:n[]= output_padding:n[]= groups:p= dilation:p[]=) -> T
aten.conv_transpose3d.input (input:T weight:T bias:T?= stride:p[]= padding:n[]= output_padding:n[]= groups:p= dilation:p[]=) -> T
aten._weight_norm.default (v:T g:T dim:i=) -> T
aten.cdist.default (x1:T x2:T p:f= compute_mode:i?=) -> T
aten.embedding.default (weight:T indices:T padding_idx:i=) -> T
aten.lstm.input (input:T hx:T[] params:T[] has_biases:b num_layers:p dropout:f train:b bidirectional:b batch_first:b) -> (T T T) [random]
aten.gru.input (input:T hx:T params:T[] has_biases:b num_layers:p dropout:f train:b bidirectional:b batch_first:b) -> (T T) [random]
aten.rnn_tanh.input (input:T hx:T params:T[] has_biases:b num_layers:p dropout:f train:b bidirectional:b batch_first:b) -> (T T) [random]
aten.rnn_relu.input (input:T hx:T params:T[] has_biases:b num_layers:p dropout:f train:b bidirectional:b batch_first:b) -> (T T) [random]
aten.lstm_cell.default (input:T hx:T[] w_ih:T w_hh:T b_ih:T?= b_hh:T?=) -> (T T)
aten.gru_cell.default (input:T hx:T w_ih:T w_hh:T b_ih:T?= b_hh:T?=) -> T
aten.rnn_tanh_cell.default (input:T hx:T w_ih:T w_hh:T b_ih:T?= b_hh:T?=) -> T
aten.rnn_relu_cell.default (input:T hx:T w_ih:T w_hh:T b_ih:T?= b_hh:T?=) -> T
aten.scaled_dot_product_attention.default (query:T key:T value:T attn_mask:T?= dropout_p:f= is_causal:b= * scale:f?= enable_gqa:b=) -> T [random]
aten.batch_norm.default (input:T weight:T? bias:T? running_mean:T? running_var:T? training:b momentum:f eps:f cudnn_enabled:b) -> T [stats]
aten.instance_norm.default (input:T weight:T? bias:T? running_mean:T? running_var:T? use_input_stats:b momentum:f eps:f cudnn_enabled:b) -> T [stats]
aten.layer_norm.default (input:T normalized_shape:n[] weight:T?= bias:T?= eps:f= cudnn_enable:b=) -> T
aten.group_norm.default (input:T num_groups:p weight:T?= bias:T?= eps:f= cudnn_enabled:b=) -> T
aten.rms_norm.default (input:T normalized_shape:n[] weight:T?= eps:f?=) -> T
aten.max_pool1d.default (self:T kernel_size:p[] stride:p[]= padding:n[]= dilation:p[]= ceil_mode:b=) -> T
aten.max_pool2d.default (self:T kernel_size:p[] stride:p[]= padding:n[]= dilation:p[]= ceil_mode:b=) -> T
aten.max_pool3d.default (self:T kernel_size:p[] stride:p[]= padding:n[]= dilation:p[]= ceil_mode:b=) -> T
aten.max_pool1d_with_indices.default (self:T kernel_size:p[] stride:p[]= padding:n[]= dilation:p[]= ceil_mode:b=) -> (T T)
aten.max_pool2d_with_indices.default (self:T kernel_size:p[] stride:p[]= padding:n[]= dilation:p[]= ceil_mode:b=) -> (T T)
aten.avg_pool1d.default (self:T kernel_size:p[] stride:p[]= padding:n[]= ceil_mode:b= count_include_pad:b=) -> T
aten.avg_pool2d.default (self:T kernel_size:p[] stride:p[]= padding:n[]= ceil_mode:b= count_include_pad:b= divisor_override:p?=) -> T
aten.avg_pool3d.default (self:T kernel_size:p[] stride:p[]= padding:n[]= ceil_mode:b= count_include_pad:b= divisor_override:p?=) -> T
aten.adaptive_avg_pool1d.default (self:T output_size:n[]) -> T
aten.adaptive_avg_pool2d.default (self:T output_size:n[]) -> T
aten.adaptive_avg_pool3d.default (self:T output_size:n[]) -> T
aten.adaptive_max_pool1d.default (self:T output_size:n[]) -> (T T)
aten.adaptive_max_pool2d.default (self:T output_size:n[]) -> (T T)
aten.upsample_nearest1d.vec (input:T output_size:n[]? scale_factors:f[]?) -> T
aten.upsample_nearest2d.vec (input:T output_size:n[]? scale_factors:f[]?) -> T
aten.upsample_bilinear2d.vec (input:T output_size:n[]? align_corners:b scale_factors:f[]?) -> T
aten.upsample_linear1d.vec (input:T output_size:n[]? align_corners:b scale_factors:f[]?) -> T
aten.upsample_bicubic2d.vec (input:T output_size:n[]? align_corners:b scale_factors:f[]?) -> T
aten.channel_shuffle.default (self:T groups:p) -> T [view]
aten.pixel_shuffle.default (self:T upscale_factor:p) -> T [view]
aten.pixel_unshuffle.default (self:T downscale_factor:p) -> T [view]
aten.dropout.default (input:T p:f train:b) -> T [view random]
aten.dropout_.default (self:T p:f train:b) -> T [inplace random]
aten.feature_dropout.default (input:T p:f train:b) -> T [view random]
aten.feature_dropout_.default (self:T p:f train:b) -> T [inplace random]
aten.alpha_dropout.default (input:T p:f train:b) -> T [view random]
aten.alpha_dropout_.default (self:T p:f train:b) -> T [inplace random]
aten.feature_alpha_dropout.default (input:T p:f train:b) -> T [view random]
aten.feature_alpha_dropout_.default (self:T p:f train:b) -> T [inplace random]
# losses
aten.cross_entropy_loss.default (self:T target:T weight:T?= reduction:i= ignore_index:i= label_smoothing:f=) -> T
aten.nll_loss.default (self:T target:T weight:T?= reduction:i= ignore_index:i=) -> T
aten.nll_loss_nd.default (self:T target:T weight:T?= reduction:i= ignore_index:i=) -> T
aten.nll_loss2d.default (self:T target:T weight:T?= reduction:i= ignore_index:i=) -> T
aten.binary_cross_entropy_with_logits.default (self:T target:T weight:T?= pos_weight:T?= reduction:i=) -> T
aten.binary_cross_entropy.default (self:T target:T weight:T?= reduction:i=) -> T
aten.mse_loss.default (self:T target:T reduction:i=) -> T
aten.l1_loss.default (self:T target:T reduction:i=) -> T
aten.huber_loss.default (self:T target:T reduction:i= delta:f=) -> T
aten.smooth_l1_loss.default (self:T target:T reduction:i= beta:f=) -> T
aten.kl_div.default (self:T target:T reduction:i= * log_target:b=) -> T
aten.soft_margin_loss.default (self:T target:T reduction:i=) -> T
aten.hinge_embedding_loss.default (self:T target:T margin:f= reduction:i=) -> T
aten.margin_ranking_loss.default (input1:T input2:T target:T margin:f= reduction:i=) -> T
aten.cosine_embedding_loss.default (input1:T input2:T target:T margin:f= reduction:i=) -> T
aten.triplet_margin_loss.default (anchor:T positive:T negative:T margin:f= p:f= eps:f= swap:b= reduction:i=) -> T
aten.poisson_nll_loss.default (input:T target:T log_input:b full:b eps:f reduction:i) -> T
aten.cosine_similarity.default (x1:T x2:T dim:i= eps:f=) -> T
aten.pairwise_distance.default (x1:T x2:T p:f= eps:f= keepdim:b=) -> T
# activations
aten.relu.default (self:T) -> T
aten.relu_.default (self:T) -> T [inplace]
aten.relu6.default (self:T) -> T
aten.relu6_.default (self:T) -> T [inplace]
aten.leaky_relu.default (self:T negative_slope:S=) -> T
aten.leaky_relu_.default (self:T negative_slope:S=) -> T [inplace]
aten.elu.default (self:T alpha:S= scale:S= input_scale:S=) -> T
aten.elu_.default (self:T alpha:S= scale:S= input_scale:S=) -> T [inplace]
aten.selu.default (self:T) -> T
aten.selu_.default (self:T) -> T [inplace]
aten.celu.default (self:T alpha:S=) -> T
aten.celu_.default (self:T alpha:S=) -> T [inplace]
aten.gelu.default (self:T * approximate:none|tanh=) -> T
aten.silu.default (self:T) -> T
aten.silu_.default (self:T) -> T [inplace]
aten.mish.default (self:T) -> T
aten.mish_.default (self:T) -> T [inplace]
aten.hardtanh.default (self:T min_val:S= max_val:S=) -> T
aten.hardtanh_.default (self:T min_val:S= max_val:S=) -> T [inplace]
aten.hardswish.default (self:T) -> T
aten.hardswish_.default (self:T) -> T [inplace]
aten.hardsigmoid.default (self:T) -> T
aten.hardsigmoid_.default (self:T) -> T [inplace]
aten.softplus.default (self:T beta:S= threshold:S=) -> T
aten.softshrink.default (self:T lambd:S=) -> T
aten.hardshrink.default (self:T lambd:S=) -> T
aten.prelu.default (self:T weight:T) -> T
aten.glu.default (self:T dim:i=) -> T
aten.log_sigmoid.default (self:T) -> T
aten.threshold.default (self:T threshold:S value:S) -> T
aten.threshold_.default (self:T threshold:S value:S) -> T [inplace]
aten.rrelu.default (self:T lower:S= upper:S= training:b=) -> T [random]
aten.sigmoid.default (self:T) -> T
aten.sigmoid_.default (self:T) -> T [inplace]
aten.tanh.default (self:T) -> T
aten.tanh_.default (self:T) -> T [inplace]
aten.softmax.int (self:T dim:i dtype:dtype?=) -> T
aten.log_softmax.int (self:T dim:i dtype:dtype?=) -> T
# elementwise
aten.add.Tensor (self:T other:N * alpha:S=) -> T
aten.add.Scalar (self:T other:S alpha:S=) -> T
aten.add_.Tensor (self:T other:N * alpha:S=) -> T [inplace]
aten.add_.Scalar (self:T other:S alpha:S=) -> T [inplace]
aten.sub.Tensor (self:T other:N * alpha:S=) -> T
aten.sub.Scalar (self:T other:S alpha:S=) -> T
aten.sub_.Tensor (self:T other:N * alpha:S=) -> T [inplace]
aten.sub_.Scalar (self:T other:S alpha:S=) -> T [inplace]
aten.rsub.Scalar (self:T other:S alpha:S=) -> T
aten.rsub.Tensor (self:T other:N * alpha:S=) -> T
aten.mul.Tensor (self:T other:N) -> T
aten.mul.Scalar (self:T other:S) -> T
aten.mul_.Tensor (self:T other:N) -> T [inplace]
aten.mul_.Scalar (self:T other:S) -> T [inplace]
aten.div.Tensor (self:T other:N) -> T
aten.div.Scalar (self:T other:S) -> T
aten.div_.Tensor (self:T other:N) -> T [inplace]
aten.div_.Scalar (self:T other:S) -> T [inplace]
aten.div.Tensor_mode (self:T other:N * rounding_mode:floor|trunc?) -> T
aten.div.Scalar_mode (self:T other:S * rounding_mode:floor|trunc?) -> T
aten.floor_divide.default (self:T other:N) -> T
aten.floor_divide.Scalar (self:T other:S) -> T
aten.remainder.Tensor (self:T other:N) -> T
aten.remainder.Scalar (self:T other:S) -> T
aten.fmod.Tensor (self:T other:N) -> T
aten.fmod.Scalar (self:T other:S) -> T
aten.true_divide.Tensor (self:T other:N) -> T
aten.pow.Tensor_Scalar (self:T exponent:S) -> T
aten.pow.Tensor_Tensor (self:T exponent:N) -> T
aten.pow.Scalar (self:S exponent:N) -> T
aten.addcmul.default (self:T tensor1:T tensor2:T * value:S=) -> T
aten.addcdiv.default (self:T tensor1:T tensor2:T * value:S=) -> T
aten.lerp.Scalar (self:T end:T weight:S) -> T
aten.lerp.Tensor (self:T end:T weight:T) -> T
aten.neg.default (self:T) -> T
aten.abs.default (self:T) -> T
aten.sign.default (self:T) -> T
aten.exp.default (self:T) -> T
aten.expm1.default (self:T) -> T
aten.log.default (self:T) -> T
aten.log1p.default (self:T) -> T
aten.log2.default (self:T) -> T
aten.log10.default (self:T) -> T
aten.sqrt.default (self:T) -> T
aten.rsqrt.default (self:T) -> T
aten.square.default (self:T) -> T
aten.reciprocal.default (self:T) -> T
aten.sin.default (self:T) -> T
aten.cos.default (self:T) -> T
aten.tan.default (self:T) -> T
aten.asin.default (self:T) -> T
aten.acos.default (self:T) -> T
aten.atan.default (self:T) -> T
aten.atan2.default (self:T other:T) -> T
aten.sinh.default (self:T) -> T
aten.cosh.default (self:T) -> T
aten.asinh.default (self:T) -> T
aten.acosh.default (self:T) -> T
aten.atanh.default (self:T) -> T
aten.erf.default (self:T) -> T
aten.erfc.default (self:T) -> T
aten.floor.default (self:T) -> T
aten.ceil.default (self:T) -> T
aten.round.default (self:T) -> T
aten.trunc.default (self:T) -> T
aten.frac.default (self:T) -> T
aten.logit.default (self:T eps:f?=) -> T
aten.logaddexp.default (self:T other:T) -> T
aten.nan_to_num.default (self:T nan:f?= posinf:f?= neginf:f?=) -> T
aten.neg_.default (self:T) -> T [inplace]
aten.abs_.default (self:T) -> T [inplace]
aten.exp_.default (self:T) -> T [inplace]
aten.log_.default (self:T) -> T [inplace]
aten.sqrt_.default (self:T) -> T [inplace]
aten.square_.default (self:T) -> T [inplace]
aten.reciprocal_.default (self:T) -> T [inplace]
aten.clamp_.default (self:T min:S?= max:S?=) -> T [inplace]
aten.zero_.default (self:T) -> T [inplace]
aten.fill_.Scalar (self:T value:S) -> T [inplace]
aten.fill_.Tensor (self:T value:T) -> T [inplace]
aten.masked_fill_.Tensor (self:T mask:T value:T) -> T [inplace]
aten.index_put_.default (self:T indices:T?[] values:T accumulate:b=) -> T [inplace]
aten.copy_.default (self:T src:T non_blocking:b=) -> T [inplace]
aten.detach_.default (self:T) -> T [inplace]
aten.masked_fill_.Scalar (self:T mask:T value:S) -> T [inplace]
aten.lerp_.Scalar (self:T end:T weight:S) -> T [inplace]
aten.clamp.default (self:T min:S?= max:S?=) -> T
aten.clamp.Tensor (self:T min:T?= max:T?=) -> T
aten.clip.default (self:T min:S?= max:S?=) -> T
aten.clip_.default (self:T min:S?= max:S?=) -> T [inplace]
aten.clamp_min.default (self:T min:S) -> T
aten.clamp_max.default (self:T max:S) -> T
aten.maximum.default (self:T other:T) -> T
aten.minimum.default (self:T other:T) -> T
aten.where.self (condition:T self:T other:T) -> T
aten.where.ScalarSelf (condition:T self:S other:T) -> T
aten.where.ScalarOther (condition:T self:T other:S) -> T
aten.where.Scalar (condition:T self:S other:S) -> T
aten.masked_fill.Scalar (self:T mask:T value:S) -> T
aten.masked_fill.Tensor (self:T mask:T value:T) -> T
aten.eq.Tensor (self:T other:N) -> T
aten.eq.Scalar (self:T other:S) -> T
aten.ne.Tensor (self:T other:N) -> T
aten.ne.Scalar (self:T other:S) -> T
aten.lt.Tensor (self:T other:N) -> T
aten.lt.Scalar (self:T other:S) -> T
aten.le.Tensor (self:T other:N) -> T
aten.le.Scalar (self:T other:S) -> T
aten.gt.Tensor (self:T other:N) -> T
aten.gt.Scalar (self:T other:S) -> T
aten.ge.Tensor (self:T other:N) -> T
aten.ge.Scalar (self:T other:S) -> T
aten.logical_and.default (self:T other:T) -> T
aten.logical_or.default (self:T other:T) -> T
aten.logical_not.default (self:T) -> T
aten.logical_xor.default (self:T other:T) -> T
aten.bitwise_and.Tensor (self:T other:N) -> T
aten.bitwise_or.Tensor (self:T other:N) -> T
aten.bitwise_not.default (self:T) -> T
aten.bitwise_xor.Tensor (self:T other:N) -> T
aten.bitwise_and.Scalar (self:T other:S) -> T
aten.bitwise_or.Scalar (self:T other:S) -> T
aten.__and__.Tensor (self:T other:N) -> T
aten.__or__.Tensor (self:T other:N) -> T
aten.isnan.default (self:T) -> T
aten.isinf.default (self:T) -> T
aten.isfinite.default (self:T) -> T
# reductions
aten.sum.default (self:T * dtype:dtype?=) -> T
aten.sum.dim_IntList (self:T dim:i[]? keepdim:b= * dtype:dtype?=) -> T
aten.mean.default (self:T * dtype:dtype?=) -> T
aten.mean.dim (self:T dim:i[]? keepdim:b= * dtype:dtype?=) -> T
aten.prod.default (self:T * dtype:dtype?=) -> T
aten.prod.dim_int (self:T dim:i keepdim:b= * dtype:dtype?=) -> T
aten.std.default (self:T unbiased:b=) -> T
aten.std.dim (self:T dim:i[]? unbiased:b= keepdim:b=) -> T
aten.std.correction (self:T dim:i[]?= * correction:S?= keepdim:b=) -> T
aten.var.default (self:T unbiased:b=) -> T
aten.var.dim (self:T dim:i[]? unbiased:b= keepdim:b=) -> T
aten.var.correction (self:T dim:i[]?= * correction:S?= keepdim:b=) -> T
aten.var_mean.dim (self:T dim:i[]? unbiased:b= keepdim:b=) -> (T T)
aten.var_mean.correction (self:T dim:i[]?= * correction:S?= keepdim:b=) -> (T T)
aten.max.default (self:T) -> T
aten.max.dim (self:T dim:i keepdim:b=) -> (T T)
aten.max.other (self:T other:T) -> T
aten.min.default (self:T) -> T
aten.min.dim (self:T dim:i keepdim:b=) -> (T T)
aten.min.other (self:T other:T) -> T
aten.amax.default (self:T dim:i[]= keepdim:b=) -> T
aten.amin.default (self:T dim:i[]= keepdim:b=) -> T
aten.argmax.default (self:T dim:i?= keepdim:b=) -> T
aten.argmin.default (self:T dim:i?= keepdim:b=) -> T
aten.all.default (self:T) -> T
aten.all.dim (self:T dim:i keepdim:b=) -> T
aten.any.default (self:T) -> T
aten.any.dim (self:T dim:i keepdim:b=) -> T
aten.logsumexp.default (self:T dim:i[] keepdim:b=) -> T
aten.norm.Scalar (self:T p:S=) -> T
aten.norm.ScalarOpt_dim (self:T p:S? dim:i[] keepdim:b=) -> T
aten.linalg_norm.default (self:T ord:S?= dim:i[]?= keepdim:b= * dtype:dtype?=) -> T
aten.linalg_vector_norm.default (self:T ord:S= dim:i[]?= keepdim:b= * dtype:dtype?=) -> T
aten.cumsum.default (self:T dim:i * dtype:dtype?=) -> T
aten.cumprod.default (self:T dim:i * dtype:dtype?=) -> T
aten.median.default (self:T) -> T
aten.median.dim (self:T dim:i keepdim:b=) -> (T T)
aten.topk.default (self:T k:n dim:i= largest:b= sorted:b=) -> (T T)
aten.sort.default (self:T dim:i= descending:b=) -> (T T)
aten.argsort.default (self:T dim:i= descending:b=) -> T
aten.count_nonzero.dim_IntList (self:T dim:i[]) -> T
# shape
aten.view.default (self:T size:n[]) -> T [view]
aten.view_as.default (self:T other:T) -> T [view]
aten.reshape.default (self:T shape:n[]) -> T [view]
aten.reshape_as.default (self:T other:T) -> T [view]
aten.flatten.using_ints (self:T start_dim:i= end_dim:i=) -> T [view]
aten.unflatten.int (self:T dim:i sizes:n[]) -> T [view]
aten.transpose.int (self:T dim0:i dim1:i) -> T [view]
aten.t.default (self:T) -> T [view]
aten.permute.default (self:T dims:i[]) -> T [view]
aten.movedim.int (self:T source:i destination:i) -> T [view]
aten.movedim.intlist (self:T source:i[] destination:i[]) -> T [view]
aten.swapaxes.default (self:T axis0:i axis1:i) -> T [view]
aten.squeeze.default (self:T) -> T [view]
aten.squeeze.dim (self:T dim:i) -> T [view]
aten.squeeze.dims (self:T dim:i[]) -> T [view]
aten.unsqueeze.default (self:T dim:i) -> T [view]
aten.expand.default (self:T size:n[] * implicit:b=) -> T [view]
aten.expand_as.default (self:T other:T) -> T [view]
aten.broadcast_to.default (self:T size:n[]) -> T [view]
aten.broadcast_tensors.default (tensors:T[]) -> T[] [view]
aten.contiguous.default (self:T * memory_format:memory=) -> T [view]
aten.clone.default (self:T * memory_format:memory?=) -> T
aten.detach.default (self:T) -> T [view]
aten.alias.default (self:T) -> T [view]
aten.lift_fresh_copy.default (self:T) -> T
aten.numpy_T.default (self:T) -> T [view]
aten.mT.default (self:T) -> T [view]
aten.to.dtype (self:T dtype:dtype non_blocking:b= copy:b= memory_format:memory?=) -> T [view]
aten.to.dtype_layout (self:T * dtype:dtype?= layout:layout?= non_blocking:b= copy:b= memory_format:memory?=) -> T [view]
aten.to.other (self:T other:T non_blocking:b= copy:b= memory_format:memory?=) -> T [view]
aten.type_as.default (self:T other:T) -> T [view]
aten._to_copy.default (self:T * dtype:dtype?= layout:layout?= non_blocking:b= memory_format:memory?=) -> T
aten.select.int (self:T dim:i index:i) -> T [view]
aten.slice.Tensor (self:T dim:i= start:i?= end:i?= step:p=) -> T [view]
aten.narrow.default (self:T dim:i start:i length:n) -> T [view]
aten.diagonal.default (self:T offset:n= dim1:i= dim2:i=) -> T [view]
aten.index_select.default (self:T dim:i index:T) -> T
aten.gather.default (self:T dim:i index:T) -> T
aten.index.Tensor (self:T indices:T?[]) -> T
aten.take_along_dim.default (self:T indices:T dim:i?=) -> T
aten.cat.default (tensors:T[] dim:i=) -> T
aten.concat.default (tensors:T[] dim:i=) -> T
aten.stack.default (tensors:T[] dim:i=) -> T
aten.hstack.default (tensors:T[]) -> T
aten.vstack.default (tensors:T[]) -> T
aten.split.Tensor (self:T split_size:i dim:i=) -> T[] [view]
aten.split_with_sizes.default (self:T split_sizes:i[] dim:i=) -> T[] [view]
aten.split.sizes (self:T split_size:i[] dim:i=) -> T[] [view]
aten.chunk.default (self:T chunks:p dim:i=) -> T[] [view]
aten.unbind.int (self:T dim:i=) -> T[] [view]
aten.repeat.default (self:T repeats:n[]) -> T
aten.tile.default (self:T dims:n[]) -> T
aten.repeat_interleave.self_int (self:T repeats:n dim:i?=) -> T
aten.flip.default (self:T dims:i[]) -> T
aten.roll.default (self:T shifts:i[] dims:i[]=) -> T
aten.tril.default (self:T diagonal:n=) -> T
aten.triu.default (self:T diagonal:n=) -> T
aten.constant_pad_nd.default (self:T pad:n[] value:S=) -> T
aten.pad.default (self:T pad:n[] mode:constant|reflect|replicate|circular= value:f?=) -> T
aten.reflection_pad1d.default (self:T padding:n[]) -> T
aten.reflection_pad2d.default (self:T padding:n[]) -> T
aten.replication_pad1d.default (self:T padding:n[]) -> T
aten.replication_pad2d.default (self:T padding:n[]) -> T
aten.meshgrid.indexing (tensors:T[] * indexing:ij|xy) -> T[] [view]
aten.unfold.default (self:T dimension:i size:n step:p) -> T [view]
aten.im2col.default (self:T kernel_size:p[] dilation:p[] padding:n[] stride:p[]) -> T
aten.scatter.src (self:T dim:i index:T src:T) -> T
aten.scatter.value (self:T dim:i index:T value:S) -> T
aten.scatter_add.default (self:T dim:i index:T src:T) -> T
aten.index_add.default (self:T dim:i index:T source:T * alpha:S=) -> T
aten.index_fill.int_Scalar (self:T dim:i index:T value:S) -> T
aten.one_hot.default (self:T num_classes:n=) -> T
# sizes
aten.sym_size.int (self:T dim:i) -> i
aten.sym_numel.default (self:T) -> i
# creation
aten.zeros.default (size:n[] * dtype:dtype?= layout:layout?=) -> T
aten.ones.default (size:n[] * dtype:dtype?= layout:layout?=) -> T
aten.full.default (size:n[] fill_value:S * dtype:dtype?= layout:layout?=) -> T
aten.zeros_like.default (self:T * dtype:dtype?= layout:layout?= memory_format:memory?=) -> T
aten.ones_like.default (self:T * dtype:dtype?= layout:layout?= memory_format:memory?=) -> T
aten.full_like.default (self:T fill_value:S * dtype:dtype?= layout:layout?= memory_format:memory?=) -> T
aten.new_zeros.default (self:T size:n[] * dtype:dtype?= layout:layout?=) -> T
aten.new_ones.default (self:T size:n[] * dtype:dtype?= layout:layout?=) -> T
aten.new_full.default (self:T size:n[] fill_value:S * dtype:dtype?= layout:layout?=) -> T
aten.arange.default (end:n * dtype:dtype?= layout:layout?=) -> T
aten.arange.start (start:n end:n * dtype:dtype?= layout:layout?=) -> T
aten.arange.start_step (start:n end:n step:n= * dtype:dtype?= layout:layout?=) -> T
aten.linspace.default (start:S end:S steps:n * dtype:dtype?= layout:layout?=) -> T
aten.eye.default (n:n * dtype:dtype?= layout:layout?=) -> T
aten.scalar_tensor.default (s:S * dtype:dtype?= layout:layout?=) -> T
aten.rand.default (size:n[] * dtype:dtype?= layout:layout?=) -> T [random]
aten.randn.default (size:n[] * dtype:dtype?= layout:layout?=) -> T [random]
aten.rand_like.default (self:T * dtype:dtype?= layout:layout?= memory_format:memory?=) -> T [random]
aten.randn_like.default (self:T * dtype:dtype?= layout:layout?= memory_format:memory?=) -> T [random]
aten.bernoulli.default (self:T) -> T [random]
aten.bernoulli.p (self:T p:f) -> T [random]
"""

_INTEGERS: Final = """
int.add (a:i b:i) -> i
int.sub (a:i b:i) -> i
int.mul (a:i b:i) -> i
int.floordiv (a:i b:i) -> i
int.mod (a:i b:i) -> i
int.neg (a:i) -> i
"""
"""Arithmetic on symbolic sizes, done by the interpreter itself."""


@dataclass(frozen=True, slots=True)
class Argument:
    """One argument of an operator. `type` is without the marks for None (`nullable`) and for optional."""

    name: str
    type: str
    nullable: bool
    required: bool
    keyword: bool


@dataclass(frozen=True, slots=True)
class Operator:
    """One line of the list. `returns` holds T (tensor), i (whole number) or is ("T[]",) for a list of tensors."""

    name: str
    arguments: tuple[Argument, ...]
    returns: tuple[str, ...]
    inplace: bool
    view: bool
    random: bool
    stats: bool


def _arguments(text: str) -> tuple[Argument, ...]:
    found: list[Argument] = []
    keyword = False
    for word in text.split():
        if word == "*":
            keyword = True
            continue
        name, _, kind = word.partition(":")
        required = not kind.endswith("=")
        kind = kind.removesuffix("=")
        nullable = kind.endswith("?")
        found.append(Argument(name, kind.removesuffix("?"), nullable, required, keyword))
    return tuple(found)


def _operator(line: str) -> Operator:
    name, _, rest = line.partition(" (")
    arguments, _, rest = rest.partition(") -> ")
    returns, _, traits = rest.partition(" [")
    words = traits.rstrip("]").split()
    return Operator(
        name,
        _arguments(arguments),
        tuple(returns.strip("()").split()),
        "inplace" in words,
        "view" in words,
        "random" in words,
        "stats" in words,
    )


OPERATORS: Final[dict[str, Operator]] = {
    operator.name: operator
    for operator in (_operator(line) for line in (_TABLE + _INTEGERS).splitlines() if line and not line.startswith("#"))
}
"""Every operator of this version by its name."""
