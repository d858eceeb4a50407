"Triton kernels, one file a family; torch and triton only."
