"""Kernels, each with a definition in plain torch beside it. Import them as `fxprune.kernels`."""

if __name__ != "fxprune.kernels":
    raise ImportError(f"import `fxprune.kernels`, not `{__name__}`: a second copy would be loaded")
