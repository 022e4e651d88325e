"""Post-training quantization: one method a file, `(model, variables, qparams, batches)` in and
`(variables, qparams)` out, so that they chain."""
