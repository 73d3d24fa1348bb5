"""Grouped-query attention: `attend(q, k, v, layout)` over packed rows is all that the decoder knows of it.

`blocks` is the reference, in plain XLA; `cudnn`, `pallas` and `splash` have the kernels of NVIDIA GPUs and TPUs, and
`backends` chooses. `cached` and, by a kernel, `filled` are generation's.
"""
