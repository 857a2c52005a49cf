"""Rewrites of a graph. Import them as `fxprune.passes`."""

if __name__ != "fxprune.passes":
    raise ImportError(f"import `fxprune.passes`, not `{__name__}`: a second copy would be loaded")
