"""kdlm_kernels: where the fused Triton kernels of kdlm's losses will live. Empty so far.

Only torch and triton may be imported here, never kdlm, and only `kdlm.losses` imports this package. Until a kernel is
written, every loss runs in its eager or chunked PyTorch form, which stays the reference afterwards.
"""
