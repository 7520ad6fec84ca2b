"""The Triton kernels by operator, written down: what is recorded, compiled or executed is compared with these names."""

ATTENTION = {
    "attention_forward_kernel",
    "rotate_kernel",
    "row_terms_kernel",
    "query_gradient_kernel",
    "key_value_gradient_kernel",
}
SINKHORN = {"column_step_kernel", "merge_rows_kernel", "plan_kernel"}
ALIGNMENT_LOSS = {
    "features_kernel",
    "count_rows_kernel",
    "norms_kernel",
    "row_pairs_kernel",
    "columns_kernel",
    "merge_pairs_kernel",
    "loss_kernel",
    "total_kernel",
    "through_length_kernel",
}
KERNELS = (
    ATTENTION
    | SINKHORN
    | ALIGNMENT_LOSS
    | {"unrotate_kernel", "row_step_kernel", "small_forward_kernel", "small_backward_kernel"}
)
"""All there are, those of some calls alone as well."""
